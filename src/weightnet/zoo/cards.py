"""Model cards: what a weights file is, in JSON beside it. Needs no PyTorch.

A card says what to expect (classes, preprocessing, measured accuracy), how the network is built, and how it was made.
"""

import dataclasses
import json
import os
import secrets
import stat
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from weightnet.errors import UsageError, WeightsError
from weightnet.images.labels import ClassLabel, imagenet_classes
from weightnet.images.transforms import Preprocess
from weightnet.nn.variants import NetworkSpec

EMBEDDED = Path(__file__).parent / "embedded"
MAX_CARD_BYTES = 32 << 20
MAX_TEXT_LENGTH = 200  # of names and labels, in characters
MAX_NETWORK_SIZE = 1 << 20  # channels, blocks or classes: far above any network, far below what fills a memory

_JSON_TYPES: dict[str, type] = {
    "name": str,
    "network": dict,
    "classes": list,
    "preprocess": dict,
    "measured": dict,
    "made_by": dict,
    "terms": str,
    "notes": dict,
    "known_from": float,
}


@dataclasses.dataclass(frozen=True)
class Card:
    """A model card.

    Args:
        name: what the model is called.
        network: what the network is built from.
        classes: one entry per logit, in order.
        preprocess: from a decoded photo to the network's input.
        measured: figures measured on photos held out of training, with what they were measured on.
        made_by: how the weights came to be: a command, a commit, a source address.
        terms: the licence of the weights and the terms of the data they come from.
        notes: anything else a user should know, as a mapping of names to values.
        known_from: the probability that a photo's best class must reach, 0 to 1; below it, the photo shows none of the
            classes. None where no such limit was set.

    Raises: UsageError where the number of classes is not the network's, two share a label, or `known_from` is no
        probability.

    Example:
        >>> card = Card("two", NetworkSpec((48, 96, 192), num_classes=2), (ClassLabel("cat"), ClassLabel("dog")))
        >>> Card.from_dict(card.to_dict()) == card
        True
    """

    name: str
    network: NetworkSpec
    classes: tuple[ClassLabel, ...]
    preprocess: Preprocess = dataclasses.field(default_factory=Preprocess)
    measured: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    made_by: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    terms: str = ""
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    known_from: float | None = None

    def __post_init__(self) -> None:
        if len(self.classes) != self.network.num_classes:
            raise UsageError(
                f"A card must name each of the network's {self.network.num_classes} classes. "
                f"Got {len(self.classes)} classes. Give one entry per logit."
            )
        repeated = [label for label, count in Counter(entry.label for entry in self.classes).items() if count > 1]
        if repeated:
            raise UsageError(f"A card's labels must differ. Got {repeated[:10]} more than once. Rename the classes.")
        if self.known_from is not None and not 0 <= self.known_from <= 1:
            raise UsageError(f"known_from must be from 0 to 1. Got known_from={self.known_from}. Set it again.")

    def to_dict(self) -> dict[str, Any]:
        """Return the card as plain data for JSON."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["network"] = _listed(dataclasses.asdict(self.network))
        fields["classes"] = [dataclasses.asdict(label) for label in self.classes]
        fields["preprocess"] = self.preprocess.to_dict()
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Card":
        """Return the card that `to_dict` made these fields of.

        Raises: WeightsError for missing, unknown or ill-typed fields.
        """
        _check_names("A model card", fields, required=("name", "network", "classes", "preprocess"), known=_JSON_TYPES)
        for name, value in fields.items():
            if (name, value) != ("known_from", None):
                _check_type(f"The card's {name}", value, _JSON_TYPES[name])
        _check_text("The card's name", fields["name"])
        try:
            return cls(
                **{
                    **fields,
                    "network": _network(fields["network"]),
                    "classes": tuple(_class_label(label) for label in fields["classes"]),
                    "preprocess": Preprocess.from_dict(fields["preprocess"]),
                }
            )
        except (TypeError, ValueError) as error:  # UsageError is a ValueError
            raise WeightsError(f"A model card must have valid fields. Got: {error}") from error


def read_card(path: str | os.PathLike[str]) -> Card:
    """Read a card.

    Raises: WeightsError where the file cannot be read or is not a card; the message names the file.
    """
    try:
        fields = json.loads(read_file(path, max_bytes=MAX_CARD_BYTES).decode("utf-8"))
        _check_type("A model card", fields, dict)
        return Card.from_dict(fields)
    except WeightsError as error:
        raise WeightsError(f"The model card {path} cannot be used. {error}") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"The model card {path} must be a JSON file. Got: {error}. Make the card again.") from error


def write_card(card: Card, path: str | os.PathLike[str]) -> None:
    """Write a card, whole or not at all.

    Raises:
        UsageError: a figure of the card is not a finite number, or JSON cannot say it.
        OSError: the folder cannot be written or is full; the old file is intact then.
    """
    try:
        text = json.dumps(card.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        data = text.encode("utf-8")
    except (TypeError, ValueError) as error:
        raise UsageError(f"A card must hold only what JSON can say. Got: {error}. Leave the value out.") from error
    write_atomically(path, data)


def printable_name(text: str, *, otherwise: str = "model") -> str:
    """Return a name as a card may have it, without what cannot be printed.

    Example:
        >>> printable_name("my\\nmodel")
        'mymodel'
    """
    return "".join(filter(str.isprintable, text))[:MAX_TEXT_LENGTH] or otherwise


def card_path(weights: str | os.PathLike[str]) -> Path:
    """Return where the card of a weights file lies: beside it, with the suffix `.json`.

    Example:
        >>> card_path("run/weights.safetensors").as_posix()
        'run/weights.json'
    """
    return Path(weights).with_suffix(".json")


def card_in_place(path: str | os.PathLike[str]) -> Card | None:
    """Return the card that lies where a new file's card goes; None where nothing does.

    Raises: UsageError where it is no card.
    """
    place = card_path(path)
    if not place.exists():
        return None
    try:
        return read_card(place)
    except WeightsError as error:
        raise UsageError(
            f"The card's place must be free. Got out={os.fspath(path)}, while {place.name} is no model card. "
            "Choose another name."
        ) from error


def card_to_share(path: str | os.PathLike[str], card: Card) -> Card | None:
    """Return the card that lies where a new file's card goes, where other files of that name have it; else None.

    What a card says of exports does not count: they may be of one model.

    Raises: UsageError where a file that is no card lies there, or the card of another model.
    """
    there, path = card_in_place(path), Path(path)
    if there is None:
        return None
    others = sharing_card(path)
    if not others and path.exists():  # it is of an older file of this very name, which goes too
        return None
    if _without_exports(there) != _without_exports(card):
        whose = f"another model, {min(others)}" if others else "another model"
        raise UsageError(
            f"The card's place must be free. Got out={path}, while {card_path(path).name} is the card of {whose}. "
            "Choose another name."
        )
    return there


def sharing_card(path: Path) -> list[str]:
    """Return the names of other files whose card lies where a file's card goes."""
    kinds = (path.suffix, ".json", ".bin")
    return [entry.name for entry in path.parent.iterdir() if entry.stem == path.stem and entry.suffix not in kinds]


def _without_exports(card: Card) -> Any:
    fields = card.to_dict()
    fields["notes"] = {name: note for name, note in fields["notes"].items() if name != "exports"}
    return json.loads(json.dumps(fields))  # as it is after a reading: lists for tuples


def default_classes(num_classes: int) -> tuple[ClassLabel, ...]:
    """Return the classes to assume where no card names them: ImageNet's for 1000, else numbered ones.

    Example:
        >>> default_classes(1000)[504].label
        'coffee mug'
    """
    return imagenet_classes() if num_classes == 1000 else numbered_classes(num_classes)


def numbered_classes(num_classes: int) -> tuple[ClassLabel, ...]:
    """Return classes without names.

    Example:
        >>> [entry.label for entry in numbered_classes(2)]
        ['class 0', 'class 1']
    """
    return tuple(ClassLabel(f"class {index}") for index in range(num_classes))


def embedded_models() -> dict[str, Path]:
    """Return the models inside the package: name to weights file, whose card lies beside it."""
    return {file.stem: file for file in sorted(EMBEDDED.glob("*.safetensors")) if card_path(file).is_file()}


def read_file(path: str | os.PathLike[str], *, max_bytes: int) -> bytes:
    """Return the content of an ordinary file; folders, pipes and devices are refused without being opened.

    Raises: WeightsError where it is no such file, cannot be read, or is larger than `max_bytes`.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise WeightsError(
                f"A weights file or card must be an ordinary file. Got {path}. Give the file's own path."
            )
        if status.st_size > max_bytes:
            raise WeightsError(
                f"The file {path} must be at most {max_bytes} bytes. Got {status.st_size}. It is not of this package."
            )
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise WeightsError(f"The file {path} must be readable. Got: {error}. Check the path and its rights.") from error


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file whole or not at all: to a temporary file in the same folder, flushed, then renamed.

    Raises: OSError where the folder cannot be written or is full; the old file is intact then.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        # Not tempfile's: its files can be read by their owner only, whatever the umask says.
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _network(fields: Mapping[str, Any]) -> NetworkSpec:
    known = [field.name for field in dataclasses.fields(NetworkSpec)]
    _check_names("The card's network", fields, required=("stage_channels",), known=known)
    sizes: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    for name, value in sizes.items():
        for size in value if isinstance(value, tuple) else (value,):
            if isinstance(size, (int, float)) and size > MAX_NETWORK_SIZE:
                raise UsageError(f"{name} must be at most {MAX_NETWORK_SIZE}. Got {name}={size}. Make the card again.")
    return NetworkSpec(**sizes)


def _class_label(fields: object) -> ClassLabel:
    _check_type("A class of the card", fields, dict)
    assert isinstance(fields, dict)
    known = [field.name for field in dataclasses.fields(ClassLabel)]
    _check_names("A class of the card", fields, required=("label",), known=known)
    label, wnid, index = fields["label"], fields.get("wnid"), fields.get("imagenet_index")
    _check_text("A class's label", label)
    if wnid is not None:
        _check_text("A class's wnid", wnid)
    if index is not None:
        _check_type("A class's imagenet_index", index, int)
    return ClassLabel(label, wnid, index)


def _check_names(what: str, fields: Mapping[str, Any], *, required: Iterable[str], known: Iterable[str]) -> None:
    missing = [name for name in required if name not in fields]
    unknown = [name for name in fields if name not in set(known)]
    if missing or unknown:
        raise WeightsError(
            f"{what} must have the fields {', '.join(required)}, and no others than {', '.join(known)}. "
            f"Got missing={missing[:10]}, unknown={unknown[:10]}. Make the card again."
        )


def _check_type(what: str, value: object, kind: type) -> None:
    kinds = (int, float) if kind is float else kind
    if not isinstance(value, kinds) or isinstance(value, bool):
        names = {str: "text", dict: "a JSON object", list: "a list", int: "a whole number", float: "a number"}
        raise WeightsError(f"{what} must be {names[kind]}. Got {str(value)[:80]!r}. Make the card again.")


def _check_text(what: str, value: object) -> None:
    # Labels and names go to terminals and web pages: no control characters from a stranger's file.
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= MAX_TEXT_LENGTH:
        raise WeightsError(
            f"{what} must be 1 to {MAX_TEXT_LENGTH} printable characters. Got {str(value)[:80]!r}. Change it."
        )


def _listed(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
