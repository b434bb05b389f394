import io
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import report_records as made
import torch

from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.errors import ConfigError, InputError, UnsupportedError
from sparse_attention_decoder.measure.record import as_cell, read
from sparse_attention_decoder.measure.report import findings, write
from sparse_attention_decoder.measure.report.markdown import markdown, markdown_table
from sparse_attention_decoder.measure.report.numbers import collect
from sparse_attention_decoder.measure.report.page import page
from sparse_attention_decoder.measure.report.plots import DRAWINGS, draw
from sparse_attention_decoder.measure.report.samples import POOLED, wilson
from sparse_attention_decoder.measure.report.sides import ORDER, side_of
from sparse_attention_decoder.measure.report.style import _MARKERS, DARK, LIGHT
from sparse_attention_decoder.measure.report.tables import INCOMPARABLE, REFERENCE, SAYS_NOTHING, tables
from sparse_attention_decoder.measure.report.wording import signed, small
from sparse_attention_decoder.tables import POLICIES

QUEST = made.side("quest", 256)


@pytest.fixture(scope="module")
def numbers():
    return collect(made.everything())


@pytest.fixture(scope="module")
def pictures(numbers):
    pytest.importorskip("matplotlib", reason="needs the extra `measure`")
    return draw(numbers)


def one_model(rows):
    (model,) = collect(rows).models
    return model


def retrieved(task, scores, where=made.DENSE, **more):
    return [made.retrieval(where, task, 2048, at, score, **more) for at, score in enumerate(scores)]


def row_of(rows, side, **fields):
    (found,) = [
        row
        for row in rows
        if row.side.label == side and all(getattr(row, name) == value for name, value in fields.items())
    ]
    return found


# numbers


def test_wilsons_interval_is_that_of_the_textbook():
    assert wilson(80.0, 10) == pytest.approx((49.02, 94.33), abs=0.01)
    assert wilson(100.0, 10) == pytest.approx((72.25, 100.0), abs=0.01)
    assert wilson(0.0, 1) == pytest.approx((0.0, 79.35), abs=0.01)


def test_scores_are_means_and_differences_are_paired():
    # quest has a sample that dense lacks: it counts for its mean, not for the difference
    rows = retrieved("vt", [1, 1, 1, 0]) + retrieved("vt", [1, 0, 1, 0.5, 1], QUEST)
    model = one_model(rows)
    dense, quest = (row_of(model.retrieval, side) for side in ("dense, our kernel", "quest, 256"))
    assert (dense.mean, dense.samples, dense.over_dense) == (75.0, 4, None)
    assert (quest.mean, quest.samples) == (pytest.approx(70.0), 5)
    assert (quest.over_dense.mean, quest.over_dense.samples) == (pytest.approx(-12.5), 4)
    # the differences are 0, -100, 0 and 50
    assert -100 <= quest.over_dense.low < -12.5 < quest.over_dense.high <= 50


def test_a_sample_measured_again_counts_once():
    again = {**retrieved("vt", [0.0])[0]}
    again["cell"] = {**again["cell"], "samples": 99}
    model = one_model([*retrieved("vt", [1, 1]), again])
    assert (model.retrieval[0].mean, model.retrieval[0].samples) == (50.0, 2)


@pytest.mark.parametrize(("right", "fails"), [(1, True), (2, False)])
def test_a_task_that_dense_cannot_do_says_nothing(right, fails):
    rows = retrieved("cwe", [1] * right + [0] * (10 - right)) + retrieved("cwe", [0] * 10, QUEST)
    model = one_model(rows)
    assert {row.dense_fails for row in model.retrieval} == {fails}
    (table,) = tables(model)
    assert any(SAYS_NOTHING in line.cells for line in table.groups[0].lines) == fails


def test_the_pool_holds_the_tasks_that_dense_can_do():
    rows = [*made.retrievals(), *retrieved("unknown to dense", [1, 1], QUEST)]
    dense = row_of(one_model(rows).retrieval, "dense, our kernel", task=POOLED, length=2048)
    # 11 of 11 needles, 8 of 11 and 5 of 11; common_words has 1 of 11
    assert (dense.samples, dense.mean) == (33, pytest.approx(100 * 24 / 33))
    quest = row_of(one_model(rows).retrieval, "quest, 256", task=POOLED, length=2048)
    assert (quest.samples, quest.over_dense.samples) == (33, 33)


def test_needles_are_grouped_by_depth():
    rows = [made.retrieval(made.DENSE, "niah_single", 2048, at, score, depth=depth)
            for at, (score, depth) in enumerate([(1, 0.0), (1, 0.51), (0, 0.49), (1, 1.0)])]  # fmt: skip
    rows += retrieved("niah_multikey", [1, 1])
    found = {(one.length, one.depth): (one.mean, one.samples) for one in one_model(rows).needles}
    assert found == {(2048, 0.0): (100.0, 1), (2048, 0.5): (50.0, 2), (2048, 1.0): (100.0, 1)}


def test_answers_are_means_in_percent(numbers):
    default = row_of(numbers.models[0].answers, "sketch, the default")
    # 0.78 less 0, 0.05 .. 0.25; three of six exact; dense has 0.80 less the same
    assert (default.f1, default.exact, default.rouge_l) == pytest.approx((65.5, 50.0, 78.0))
    assert (default.over_dense.mean, default.over_dense.low, default.over_dense.high) == pytest.approx((-2, -2, -2))


def test_a_ratio_measured_in_turns_goes_before_one_of_medians():
    rows = [
        made.speed(made.STOCK, 2048, 100.0),
        made.speed(made.DENSE, 2048, 50.0),
        made.speed(made.DEFAULT, 2048, 40.0, over={"transformers": 0.5, "sketch, 64": 2.0, "dense, our kernel": None}),
    ]
    default = row_of(one_model(rows).speed, "sketch, the default")
    assert default.over == {"transformers": 0.5, "dense, our kernel": 0.8}
    assert default.best_dense == (0.8, "dense, our kernel")


def test_sides_are_compared_within_a_setting():
    other = made.speed(made.STOCK, 2048, 10.0)
    other["cell"]["threads"] = 1
    rows = [made.speed(made.DEFAULT, 2048, 40.0), other]
    assert row_of(one_model(rows).speed, "sketch, the default").over == {}


def test_values_that_are_no_numbers_are_absent():
    row = made.speed(made.DEFAULT, 2048, 40.0, kl="<b>", top1=True, ttft_s=None, peak_bytes=float("inf"))
    found = one_model([row]).speed[0]
    assert (found.kl, found.top1, found.ttft_s, found.peak_bytes) == (None, None, None, None)


def test_what_forgets_is_marked():
    assert side_of(made.side("snapkv", 256)).label == "snapkv, 256 (evicts)"
    press = side_of({"engine": "kvpress", "config": {"press": "knorm"}})
    assert (press.label, press.evicts, press.is_dense) == ("kvpress (press knorm) (evicts)", True, False)
    assert not side_of(QUEST).evicts and side_of(made.LLAMA).is_dense


def test_without_the_default_sentences_are_about_the_first_sparse_side():
    rows = [made.speed(made.STOCK, 2048, 100.0), made.speed(QUEST, 2048, 40.0, 0.2, kl=0.1)]
    assert one_model(rows).subject_name == "quest, 256"


def without(row, part, key=None):
    return {**row, part: {name: value for name, value in row[part].items() if name != key}} if key else {
        name: value for name, value in row.items() if name != part
    }  # fmt: skip


SPEED = made.speed(made.DEFAULT, 2048, 40.0)


@pytest.mark.parametrize(
    ("rows", "error", "match"),
    [
        ([], InputError, "no measurement among 0 records"),
        ([made.machine(), {**SPEED, "kind": "dream"}], InputError, "expected kinds speed, agreement"),
        ([without(SPEED, "cell", "context")], InputError, "does not name its context"),
        ([without(SPEED, "result")], InputError, "has no cell or no result"),
        ([made.speed({"engine": "ours", "config": {"budget": 3}}, 64, 1.0)], InputError, "none of this version's"),
        ([made.speed({"engine": "ours", "config": {"policy": "magic"}}, 64, 1.0)], ConfigError, "'magic'"),
    ],
)
def test_records_that_cannot_be_shown_are_refused(rows, error, match):
    with pytest.raises(error, match=match):
        collect(rows)


# sentences


def test_the_summary_is_made_from_the_numbers(numbers):
    scope, first, second, retrieval, crossover = findings.summary(numbers)
    assert scope.startswith("Measured: SmolLM2-135M-Instruct and <script>")
    assert scope.endswith("contexts from 2,048 to 32,768 tokens, 24 ways of decoding.")
    # 94.41 ms over 294.06 ms
    assert first == (
        "On SmolLM2-135M-Instruct at 32,768 tokens the default reads 11.5% of the bytes: "
        "KL 0.0008, top-1 0.98, perplexity +0.1%, 0.32 of transformers' time per token."
    )
    assert second.endswith("perplexity 0.0%, 0.88 of the time per token of _odd$<i>.")
    assert "the default scores 72.7% over all tasks that dense can do, 0.0 points from dense" in retrieval
    assert crossover == (
        "On SmolLM2-135M-Instruct the default is faster than the best dense from 7,000 tokens on "
        "(0.57 of its time at 32,768)."
    )


def test_of_many_models_the_worst_is_named():
    rows = [row for at in range(3) for row in (
        made.agreement(made.DEFAULT, 7000, 0.1 + at / 10, 0.001 * (1 + at), f"model {at}"),
        made.speed(made.STOCK, 7000, 100.0, model=f"model {at}"),
        made.speed(made.DEFAULT, 7000, 90.0 - 10 * at, 0.2, f"model {at}"),
    )]  # fmt: skip
    text = " ".join(findings.summary(collect(rows)))
    assert "reads 10.0% to 30.0% of the bytes; the worst KL is 0.0030 (model 2, top-1 0.96, perplexity +0.4%)" in text
    assert "It takes 0.70 (model 2) to 0.90 (model 0) of transformers' time per token." in text


@pytest.mark.parametrize(
    ("ratios", "says"),
    [
        ([1.2, 1.1, 1.3], "is not faster than the best dense at 32,768 tokens (1.30 of its time)"),
        ([0.9, 0.8, 0.7], "is faster than the best dense at every context measured (0.70"),
        ([0.9, 1.1, 0.7], "is faster than the best dense from 32,768 tokens on (0.70"),
    ],
)
def test_the_crossover_is_where_it_is_faster_from_then_on(ratios, says):
    rows = [row for context, ratio in zip(made.CONTEXTS, ratios, strict=True) for row in (
        made.speed(made.DENSE, context, 100.0), made.speed(made.DEFAULT, context, 100.0 * ratio, 0.2)
    )]  # fmt: skip
    assert says in findings.crossover(one_model(rows))


def test_the_best_rival_reads_no_more_than_the_default(numbers):
    # at 32,768 tokens quest, 256 reads 8.8 % and has a KL of 0.06 * 11 / 9; oracle, 64 reads more
    assert findings.quality(numbers.models[0]).endswith("that reads no more, quest, 256, is at 0.073.")


def test_small_numbers_and_signs():
    assert [small(value) for value in (None, 0.0, 3e-9, 0.00084, 0.0135, 0.82)] == [
        "\N{EN DASH}", "0", "< 0.0001", "0.0008", "0.013", "0.82"
    ]  # fmt: skip
    assert [signed(value) for value in (-0.04, 1.25, -3.0)] == ["0.0", "+1.2", "\N{MINUS SIGN}3.0"]


# tables


def test_bytes_come_first_and_quality_stands_beside_every_time(numbers):
    for model in numbers.models:
        for table in tables(model):
            assert table.heads[0][0] == "bytes read"
            assert {len(line.cells) for group in table.groups for line in group.lines} == {len(table.heads)}
    speed = tables(numbers.models[0])[0]
    assert [name for name, _ in speed.heads[:4]] == ["bytes read", "KL", "top-1", "ms a token"]
    cells = {line.name: line.cells[:4] for line in speed.groups[1].lines}
    assert cells["sketch, the default"] == ("17.1%", "0.0008", "0.980", "65.8")
    assert cells["llama.cpp (kv f16)"] == ("\N{EN DASH}", INCOMPARABLE, "\N{EN DASH}", "71.9")


def test_dense_that_was_not_compared_with_itself_is_the_reference():
    (table,) = tables(one_model([made.speed(made.DENSE, 2048, 50.0)]))
    assert table.groups[0].lines[0].cells[1] == REFERENCE


def test_budgets_are_ordered_as_numbers(numbers):
    names = [side.label for side in numbers.models[0].sides if side.idea == "quest"]
    assert names == ["quest, 64", "quest, 256", "quest, 1024"]


def test_markdown_has_every_row_and_no_markup_of_the_records(numbers):
    text = markdown(numbers)
    assert "<script" not in text and "<img" not in text
    for model in numbers.models:
        for table in tables(model):
            head, rule, *rows = markdown_table(table).splitlines()
            bars = {len(re.findall(r"(?<!\\)\|", line)) for line in (head, rule, *rows)}
            assert bars == {len(table.heads) + 3}
            assert len(rows) == sum(len(group.lines) for group in table.groups)
    assert "| 7,000 tokens | **sketch, the default** | 17.1% | 0.0008 | 0.980 | 65.8 |" in text


# pictures


def image(data):
    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")


def luminance(colour):
    """Relative luminance of #rrggbb, as WCAG defines it."""
    parts = torch.tensor([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    linear = torch.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ torch.tensor([0.2126, 0.7152, 0.0722]))


def test_every_picture_that_has_records_is_drawn_light_and_dark(pictures, numbers):
    assert len(pictures) == len(DRAWINGS) * len(numbers.models)
    assert all(picture.light for picture in pictures[: len(DRAWINGS)])
    drawn = [picture for picture in pictures if picture.light]
    assert len({picture.file for picture in pictures}) == len(pictures)
    for picture in drawn:
        assert re.fullmatch(r"[a-z0-9.-]+\.png", picture.file)
        for data, palette in ((picture.light, LIGHT), (picture.dark, DARK)):
            found = image(data)
            assert found.size == (picture.width, picture.height)
            assert found.getpixel((0, 0)) == tuple(bytes.fromhex(palette.background[1:]))
            colours = found.getcolors(1 << 20)
            # not blank: a page of one colour has one, and most of a picture is ground
            assert len(colours) > 20 and 0.25 < max(count for count, _ in colours) / (found.width * found.height) < 0.99


def test_pictures_without_records_are_named(pictures):
    missing = {picture.needs for picture in pictures[len(DRAWINGS) :] if not picture.light}
    assert missing == {"agreement", "speed with peak memory", "retrieval of niah_single", "retrieval"}


def test_the_same_records_give_the_same_bytes(pictures, numbers):
    few = replace(numbers, models=numbers.models[1:])
    assert [picture.light for picture in draw(few)] == [picture.light for picture in pictures[len(DRAWINGS) :]]


def test_two_settings_are_two_panels(pictures):
    one = next(picture for picture in pictures if picture.title == "Time per token")
    more = [*made.speeds()]
    for row in more:
        row["cell"]["threads"] = 1
    two = next(picture for picture in draw(collect([*made.speeds(), *more])) if picture.title == one.title)
    assert two.height > 1.3 * one.height


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=lambda palette: palette.name)
def test_every_idea_has_a_colour_of_its_own_that_can_be_seen(palette):
    assert set(POLICIES) <= set(ORDER) == set(palette.colours) == set(_MARKERS)
    assert len(set(palette.colours.values())) == len(set(_MARKERS.values())) == len(ORDER)
    ground = luminance(palette.background)
    for colour, least in [
        *((colour, 3.0) for colour in palette.colours.values()),
        (palette.ink, 7),
        (palette.muted, 4.5),
    ]:
        low, high = sorted((ground, luminance(colour)))
        assert (high + 0.05) / (low + 0.05) >= least, colour


def test_without_matplotlib_the_extra_is_named(numbers, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnsupportedError, match=r"sparse-attention-decoder\[measure\]"):
        draw(numbers)


# page


class Tags(HTMLParser):
    """Every tag with its attributes, and the text outside of the style."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def html(numbers, pictures, tmp_path_factory):
    return page(numbers, pictures, [tmp_path_factory.mktemp("secret") / "a<b>.jsonl"])


def test_the_page_asks_nothing_of_anyone(html):
    tags = Tags(html).tags
    assert not {tag for tag, _ in tags} & {"script", "iframe", "object", "embed", "form", "base", "b", "i"}
    ids = {attributes["id"] for _, attributes in tags if "id" in attributes}
    for tag, attributes in tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "srcset", "action", "poster", "data"):
            if name in attributes:
                assert attributes[name].startswith("data:") or attributes[name][1:] in ids, tag
    assert "url(" not in html and "@import" not in html
    # what is named by id is there
    named = {attributes["aria-labelledby"] for _, attributes in tags if "aria-labelledby" in attributes}
    assert named <= ids


def test_hostile_text_is_text(html):
    parsed = Tags(html)
    words = "".join(parsed.words)
    for text in (made.HOSTILE, "<img src=x onerror=alert(1)>", "Made-up CPU <b>9</b>", "_odd$<i>", "a<b>.jsonl"):
        assert text in words
    assert "secret" not in html


def test_the_page_is_built_for_whoever_cannot_see_it(html):
    tags = Tags(html).tags
    heads = [int(tag[1]) for tag, _ in tags if re.fullmatch("h[1-6]", tag)]
    assert heads.count(1) == 1 and heads[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(heads))
    assert all("scope" in attributes for tag, attributes in tags if tag == "th")
    alts = [attributes["alt"] for tag, attributes in tags if tag == "img"]
    assert len(alts) == 16 and all(len(alt) > 40 for alt in alts)
    assert any("the default reads 11.5% of the bytes at a KL of 0.0008" in alt for alt in alts)
    assert "Not drawn, for there are no records of it: quality against bytes read (needs agreement)" in html


def test_the_page_says_how_to_make_it_again(html):
    assert "sparse-decoder report a&lt;b&gt;.jsonl --out report" in html


def test_a_report_is_a_page_pictures_and_markdown(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra `measure`")
    rows = [made.machine(), made.speed(made.STOCK, 2048, 50.0), made.speed(made.DEFAULT, 2048, 40.0, 0.3, kl=0.001)]
    records = made.write(tmp_path / "speed.jsonl", rows)
    assert read([records])
    written = write([records], tmp_path / "new" / "report")
    names = [path.name for path in written]
    stem = "1-smollm2-135m-instruct"
    assert names == ["report.html", f"{stem}-time.png", f"{stem}-crossover.png", f"{stem}-memory.png", "report.md"]
    assert all(path.stat().st_size > 200 for path in written)
    assert write([records], tmp_path / "new" / "report") == written
    with pytest.raises(InputError, match="name another folder"):
        write([records], records)


def test_a_policy_of_a_default_config_is_the_sketch():
    assert side_of({"engine": "ours", "config": {}}) == side_of(
        {"engine": "ours", "config": as_cell(AttentionConfig())}
    )
