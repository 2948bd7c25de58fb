import json
from pathlib import Path

from weightnet.cli import models
from weightnet.nn.complexity import complexity
from weightnet.nn.shufflenet import ShuffleNetV2
from weightnet.nn.variants import VARIANTS, NetworkSpec

# name, exact parameters, exact multiply-adds in millions, and what the page prints
ROWS = [
    ("shufflenet_v2_x0_5.plain", 1_366_792, "40.476", "1.4M", "41M", "39.7"),
    ("shufflenet_v2_x1_0.plain", 2_211_976, "137.611", "2.2M", "138M", "30.9"),
    ("shufflenet_v2_x1_5.plain", 3_507_720, "298.971", "3.5M", "299M", "27.4"),
    ("shufflenet_v2_x2_0.plain", 5_503_992, "557.270", "5.5M", "557M", "25.5"),
    ("shufflenet_v2_x0_5", 1_463_928, "40.704", "1.5M", "41M", "36.7"),
    ("shufflenet_v2_x1_0", 2_435_832, "138.534", "2.4M", "139M", "28.8"),
    ("shufflenet_v2_x1_5", 3_915_344, "301.097", "3.9M", "301M", "25.6"),
    ("shufflenet_v2_x2_0", 6_198_068, "561.368", "6.1M", "562M", "24.1"),
    ("shufflenet_v2_x0_5.wn8x", 2_736_216, "41.958", "2.7M", "42M", "34.0"),
    ("shufflenet_v2_x1_0.wn4x", 5_143_896, "141.209", "5.1M", "141M", "27.6"),
    ("shufflenet_v2_x1_5.wn4x", 9_624_336, "306.781", "9.6M", "307M", "25.0"),
    ("shufflenet_v2_x2_0.wn4x", 18_268_604, "573.364", "18.1M", "573M", "23.5"),
]


def test_models_json_has_exact_numbers_beside_the_pages_texts(weightnet):
    rows = weightnet("models", "--json").rows[: len(ROWS)]
    for row, (name, params, macs_in_millions, page_params, page_flops, page_error) in zip(rows, ROWS, strict=True):
        assert list(row) == ["name", "params", "macs", "page"]
        assert (row["name"], row["params"]) == (name, params)
        assert isinstance(row["macs"], int)
        assert f"{row['macs'] / 1e6:.3f}" == macs_in_millions
        assert row["page"] == {"params": page_params, "flops": page_flops, "top1_error": page_error}


def test_models_shows_the_pages_tables_published_beside_exact(weightnet):
    outcome = weightnet("models", "shufflenet*")
    expected = Path(__file__).parents[1] / "expect" / "cli" / "models.txt"
    assert (outcome.code, outcome.err) == (0, "")
    message = "the tables changed: run scripts/update_expected_cli.py and review the difference"
    assert outcome.out == expected.read_text(encoding="utf-8"), message


def test_models_legend_is_right_about_what_rounds_to_the_print():
    def rounds(exact: int, printed: str) -> bool:
        number = printed.removesuffix("M")
        digits = len(number.partition(".")[2])
        return f"{exact / 1e6:.{digits}f}" == number

    wrong = []
    for name, variant in VARIANTS.items():
        assert rounds(variant.totals.page_params, variant.printed.params), name
        if not rounds(variant.totals.page_flops, variant.printed.flops):
            wrong.append((name, f"{variant.totals.page_flops / 1e6:.0f}M", variant.printed.flops))
    assert wrong == [("shufflenet_v2_x2_0", "561M", "562M")]
    assert "All but one round to what the page prints; shufflenet_v2_x2_0 has 561M, not 562M." in models.LEGEND


def test_models_selects_by_pattern(weightnet):
    rows = weightnet("models", "*x1_0*", "--json").rows
    assert [row["name"] for row in rows] == [
        "shufflenet_v2_x1_0.plain",
        "shufflenet_v2_x1_0",
        "shufflenet_v2_x1_0.wn4x",
    ]
    text = weightnet("models", "*.wn4x").out
    assert "second table" in text
    assert "first table" not in text


def test_models_refuses_a_pattern_without_a_match(weightnet):
    outcome = weightnet("models", "shufflenet_v2_x05")
    assert (outcome.code, outcome.out) == (2, "")
    assert "Did you mean shufflenet_v2_x0_5" in outcome.err


def test_models_shows_what_was_measured_of_embedded_models(weightnet, as_default):
    row = weightnet("models", "default", "--json").rows[0]
    assert (row["name"], row["measured"]) == ("default", {"top1": 0.25})
    assert row["page"] == {"params": None, "flops": None, "top1_error": None}
    text = weightnet("models").out
    assert text.splitlines()[-1] == "default: 5 classes, 32 x 32 px; top1 0.2500"


def test_models_counts_networks_with_another_classifier():
    spec = NetworkSpec((48, 96, 192), M=2, G=2, num_classes=112)
    counted = complexity(ShuffleNetV2(spec))
    assert models._totals(spec) == (counted.params, counted.macs)


def test_models_counts_no_other_network():
    assert models._totals(NetworkSpec((32, 64, 128))) == (None, None)


def test_models_json_is_one_row_a_line(weightnet):
    lines = weightnet("models", "*plain", "--json").out.splitlines()
    assert (lines[0], lines[-1], len(lines)) == ("[", "]", 6)
    assert json.loads(lines[1].rstrip(","))["name"] == "shufflenet_v2_x0_5.plain"
