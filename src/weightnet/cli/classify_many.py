"""`weightnet classify-many`: very many photos in, partitions of rows out."""

import contextlib
import dataclasses
import functools
import json as json_format
import sys
from typing import Annotated, Literal

from cyclopts import Parameter

from weightnet.cli.output import Switch, open_results, printable_path, progress, say
from weightnet.cli.predict import STDIN, check_stdin
from weightnet.errors import UsageError


def classify_many(
    *inputs: Annotated[str, Parameter(name="IN")],
    out: str,
    format: Literal["parquet", "jsonl", "csv"] = "parquet",
    model: str = "default",
    engine: str = "auto",
    device: str = "auto",
    k: Annotated[int, Parameter(name="-k")] = 5,
    embeddings: Switch = False,
    batch_size: int = 16,
    rows_per_file: int = 1000,
    image_column: str = "image",
    runner: Literal["local", "ray"] = "local",
    workers: Annotated[int | None, Parameter(show_default=False)] = None,
    json: Switch = False,
) -> int:
    """Classify or embed very many photos and write one row for each, in partitions `OUT/part-00000.parquet` and so on.

    Killed at any moment, the same command goes on where it was, without losing or repeating a row. At the end, a line
    on standard output counts the photos.

    Exit codes: 0 where all photos were classified; 1 where one could not be (its row says why); 2 for wrong usage, an
    unknown model, or where nothing matched.

    Args:
        inputs: Folders (all photos, tar shards and Parquet files below); quoted patterns; `LIST.txt`, or `-` for
            standard input: one path on each line; tar shards, as webdataset writes them (`SHARD.tar`); Parquet files
            (`TABLE.parquet`); photos.
        out: The folder to write to: new, empty, or of the same run.
        format: parquet, jsonl or csv.
        model: A name of `weightnet models`, a run folder, a weights file, or its address; or a file of
            `weightnet export`.
        engine: What runs the network: onnxruntime or openvino for a model inside the package and an .onnx file,
            openvino for .xml, executorch for .pte, mnn for .mnn, torch for .pt2 and all that is not exported; auto
            takes the first that fits.
        device: auto or cpu; with torch cuda, cuda:N or mps too, and auto takes a GPU where there is one.
        k: How many classes a row names, the most probable first.
        embeddings: Write the pooled features (`pre_logits`) instead of classes.
        batch_size: Photos that run at once.
        rows_per_file: Rows of a partition; a kill costs at most as much work.
        image_column: The column of Parquet files that holds the photos: bytes, or bytes and path as Hugging Face has
            it.
        runner: local, or ray for Ray Data, on this machine or a cluster.
        workers: Processes of the runner ray; one on each machine if left out.
        json: Write the counts as a JSON object.
    """
    from weightnet.bulk import pipeline
    from weightnet.bulk.worker import BulkConfig

    config = BulkConfig(
        out=out,
        format=format,
        model=model,
        engine=engine,
        device=device,
        k=k,
        embeddings=embeddings,
        batch_size=batch_size,
        rows_per_file=rows_per_file,
        image_column=image_column,
        runner=runner,
        workers=workers,
    )
    if out in ("-", STDIN):
        raise UsageError("out must be a folder. Got out='-'. Name one; the counts go to standard output.")
    if STDIN in inputs:
        check_stdin("a list")
    results = open_results()
    reports: list[str] = []

    def report(message: str) -> None:
        reports.append(message)
        say(f"weightnet: {printable_path(message)}")

    with contextlib.redirect_stdout(sys.stderr):  # Ray prints there what happens to its workers
        summary = pipeline.classify_many(
            ["-" if text == STDIN else text for text in inputs],
            config,
            report=report,
            progress=functools.partial(progress, rows=False),
            stdin=sys.stdin.buffer if STDIN in inputs else None,
        )
    if summary.resumed == summary.partitions:
        say(f"weightnet: nothing is left to do in {printable_path(out)}: the run was finished before.")
    elif summary.resumed:
        say(f"weightnet: went on with {summary.resumed} of {summary.partitions} partitions done before.")
    if json:
        text = json_format.dumps({**dataclasses.asdict(summary), "out": out})
    else:
        text = f"images {summary.images}, ok {summary.ok}, errors {summary.errors}, partitions {summary.partitions}"
    results.write(text + "\n")
    return 1 if summary.errors or reports else 0
