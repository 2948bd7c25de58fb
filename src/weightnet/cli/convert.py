"""`weightnet convert`: weights from one format to another."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from weightnet.cli.output import open_results, printable
from weightnet.errors import needs_torch

if TYPE_CHECKING:
    from weightnet.zoo.cards import Card


def convert(
    source: Annotated[str, Parameter(name="IN")],
    out: Annotated[str, Parameter(name="OUT")],
    /,
    *,
    pixels: Literal["auto", "normalised", "raw"] = "auto",
) -> int:
    """Convert weights to safetensors with a card beside them, or to a MegEngine state dict.

    Args:
        source: A MegEngine, PyTorch or safetensors file, its address, a run folder or a name of `weightnet models`.
        out: OUT.safetensors, beside which the card is written as OUT.json; or OUT.pkl or OUT.model, which the original
            reads.
        pixels: What the weights were trained on; auto lets the statistics in the stem's batch norm decide.
    """
    with needs_torch("`weightnet convert`"):
        from weightnet.zoo.convert import convert as convert_weights

    results = open_results()
    results.write(printable(_gist(convert_weights(source, out, pixels=pixels), out)) + "\n")
    return 0


def _gist(card: "Card", out: str) -> str:
    network = card.network
    generated = f"WeightNet M={network.M} G={network.G}" if network.M else "plain"
    labels = ", ".join(entry.label for entry in card.classes[:3])
    size = card.preprocess
    lines = [
        f"{out}: {card.name}",
        f"  network     ShuffleNetV2 {'/'.join(map(str, network.stage_channels))}, {generated}",
        f"  classes     {len(card.classes)} ({labels}{', ...' if len(card.classes) > 3 else ''})",
        f"  input       {size.channel_order}, short edge {size.resize}, crop {size.crop}, {size.interpolation}",
        f"  pixels      {_pixels(card)}",
    ]
    return "\n".join(lines)


def _pixels(card: "Card") -> str:
    kind = "raw 0..255" if card.preprocess.mean is None else "normalised by mean and std"
    decision: Any = card.notes.get("pixels")
    if not isinstance(decision, dict):
        return f"{kind} (as the card of the source says)"
    margin = decision.get("margin")
    return f"{kind}; margin {'unknown' if margin is None else f'{margin} nats'}; {decision.get('decided_by')}"
