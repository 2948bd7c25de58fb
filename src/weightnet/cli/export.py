"""`weightnet export`: a model as a file for another runtime."""

import json as json_format
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from weightnet.cli.output import Switch, open_results, printable
from weightnet.errors import needs_torch


def export(
    model: Annotated[str, Parameter(name="MODEL")],
    out: Annotated[str, Parameter(name="OUT")],
    /,
    *,
    precision: Literal["fp32", "fp16", "bf16", "int8"] = "fp32",
    form: Literal["auto", "feature", "matmul"] = "auto",
    outputs: Annotated[
        tuple[Literal["logits", "pre_logits", "features", "class_weights"], ...],
        Parameter(consume_multiple=True, negative="", show_default=False),
    ] = ("logits",),
    preprocessing: Switch = False,
    calibration: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="", show_default=False)] = (),
    json: Switch = False,
) -> int:
    """Write a model as a file for another runtime, and its card beside it.

    The suffix says which: .onnx for ONNX Runtime, .xml (with .bin) for OpenVINO, .pt2 for PyTorch (`torch.export`),
    .pte for ExecuTorch, .mnn for MNN. The file is then a model's name for `weightnet predict`. It takes any number of
    photos at once; a .pte file takes them one by one. Before it is written it is run in its runtime, and must give the
    network's numbers.

    Args:
        model: A name of `weightnet models`, a run folder, a weights file, or its address.
        out: OUT.onnx, OUT.xml, OUT.pt2, OUT.pte or OUT.mnn; the card is OUT.json.
        precision: fp16, for .onnx, .xml and .mnn, keeps the weights in half precision, in a file half as large, and
            computes in single precision; bf16, for .xml, also computes in bfloat16 where the processor has it; int8,
            for .xml, computes static convolutions in 8-bit integers, of a WeightNet all with --form feature, and needs
            --calibration.
        form: How generated 1x1 layers are computed: feature as static convolutions and gains, matmul as a batched
            matrix product by mixed kernels; auto takes the faster one for each stage of the network.
        outputs: What the file gives beside logits: pre_logits are the pooled features, features the last map,
            class_weights the classifier's weights, by which features become the heat map of a class.
        preprocessing: Put the preprocessing, but for resize and crop, into an .onnx or .xml file: it takes photos
            (B, H, W, 3), uint8, in the order blue, green, red, and gives their probabilities too.
        calibration: Photos such as the model was trained on, by which int8 sets its ranges: files, folders and quoted
            patterns; at least 32 photos, of which up to 256 are used.
        json: Write a JSON object: `{"path", "bytes", "precision", "outputs", "largest_error", "allowed_error",
            "checked_in", "exporter"}`, "preprocessing" where it is inside, and for int8 "calibration" and
            "top1_agreement".
    """
    with needs_torch("`weightnet export`", extra="export"):
        from weightnet.export.model import export_model

    results = open_results()
    card = export_model(
        model,
        out,
        precision=precision,
        form=form,
        outputs=outputs,
        preprocessing=preprocessing,
        calibration=calibration or None,
    )
    path = Path(out)
    files = [path, path.with_suffix(".bin")][: 2 if path.suffix == ".xml" else 1]
    entry = card.notes["exports"][path.suffix]
    report = {"path": out, "bytes": sum(file.stat().st_size for file in files), **entry}
    text = json_format.dumps(report) if json else printable(_gist(card.name, report))
    results.write(text + "\n")
    return 0


def _gist(name: str, report: dict[str, Any]) -> str:
    errors = ", ".join(f"{output} {error:.1e}" for output, error in report["largest_error"].items())
    whole = "the root mean square" if report["precision"] == "int8" else "the largest value"
    lines = [
        f"{report['path']}: {name}",
        f"  size        {report['bytes'] / 1e6:.1f} MB, {report['precision']}",
        f"  outputs     {', '.join(report['outputs'])}",
        f"  checked in  {report['checked_in']}, against double precision",
        f"  error       {errors} of {whole} (allowed: {report['allowed_error']:.0e})",
    ]
    if "calibration" in report:
        photos, unreadable = report["calibration"]["photos"], report["calibration"]["unreadable"]
        skipped = f" ({unreadable} more could not be read)" if unreadable else ""
        lines.append(
            f"  calibrated  on {photos} photos{skipped}; same class as the network: {report['top1_agreement']:.1%}"
        )
    return "\n".join(lines)
