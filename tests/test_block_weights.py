"""Block weights read as the extension that invented the lists reads them, and by name."""

import pytest

from lib_hypermerge.errors import SpecError
from lib_hypermerge.jobs.block_weights import FORMATS, PRESETS, blocks_of, parse

NAMES_17 = ["IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "MID", *(f"OUT{i:02d}" for i in range(3, 12))]


def test_nothing_written_means_one_everywhere():
    weights = parse("  ", "sd1")
    assert weights.of("unet", "IN04") == weights.of("te", "L00") == weights.of("unet", "TIME") == 1


def test_seventeen_numbers_of_sd1():
    weights = parse(",".join(str(i) for i in range(17)), "sd1")
    assert [weights.of("unet", block) for block in NAMES_17] == list(range(1, 17))
    assert weights.of("te", "L05") == 0
    # what the short list leaves out gets nothing, what is in no block follows the first number
    weights = parse("0.5" + ",1" * 16, "sd2")
    assert weights.of("unet", "IN00") == weights.of("unet", "OUT01") == 0
    assert weights.of("unet", "TIME") == weights.of("unet", "OUT") == weights.of("te", "EMB") == 0.5


@pytest.mark.parametrize(
    ("count", "architecture", "block", "position"),
    [
        (26, "sd1", "IN00", 1),
        (26, "sd1", "OUT11", 25),
        (26, "sd2", "MID", 13),
        (12, "sdxl", "IN04", 1),
        (12, "sdxl", "MID", 5),
        (12, "sdxl", "OUT05", 11),
        (20, "sdxl", "IN08", 9),
        (20, "sdxl", "OUT08", 19),
        (61, "flux", "D00", 3),
        (61, "flux", "S37", 59),
    ],
)
def test_each_number_is_for_its_block(count, architecture, block, position):
    weights = parse(",".join("1" if i == position else "0" for i in range(count)), architecture)
    assert weights.of("unet", block) == 1
    assert sum(weights.of("unet", other) for other in blocks_of(architecture)[1:]) == 1


@pytest.mark.parametrize("architecture", ["sd1", "sd2", "sdxl", "flux"])
def test_formats_have_as_many_blocks_as_their_number(architecture):
    for count, (ids, blocks) in FORMATS.items():
        assert len(blocks) == len(set(blocks)) == count
        assert architecture not in ids or set(blocks) <= set(blocks_of(architecture))


def test_presets():
    assert parse("none", "sd1").of("te", "L00") == 0
    assert parse("ALL0.5", "sdxl").of("unet", "MID") == 0.5
    outs = parse("OUTALL", "sd1")
    assert (outs.of("unet", "OUT03"), outs.of("unet", "IN03"), outs.of("te", "L00")) == (1, 0, 1)
    for preset in PRESETS:
        assert parse(preset, "sdxl") and parse(preset, "sd2")


def test_ranges_and_names():
    weights = parse("IN00-IN05=0.5, M00: 0, OUT=2, te=-1, default=0.25", "sd1")
    assert [weights.of("unet", b) for b in ("IN00", "IN05", "IN06", "MID", "OUT07", "OUT", "TIME")] == [
        0.5, 0.5, 0.25, 0, 2, 2, 0.25,
    ]  # fmt: skip
    assert weights.of("te", "L00") == -1
    assert parse("IN05-OUT02=0", "sd1").of("unet", "MID") == 0
    assert parse("D=0, S00-S03=0.5", "flux").of("unet", "S02") == 0.5
    assert parse("J00-J11=0.5, OUT=0", "sd3").of("unet", "J11") == 0.5


def test_the_t5_of_flux_has_a_number_of_its_own():
    weights = parse("0.5,0.25" + ",1" * 59, "flux")
    assert (weights.of("te1", "L00"), weights.of("te3", "L00"), weights.of("unet", "IN")) == (0.5, 0.25, 1)
    assert parse("BASE=0.5", "sd3").of("te3", "L00") == 0.5


@pytest.mark.parametrize(
    ("text", "architecture", "complaint"),
    [
        ("1,1,1", "sd1", "17 or 26"),
        (",".join("1" * 17), "sdxl", "12 or 20"),
        (",".join("1" * 12), "sd1", "17 or 26"),
        ("a," + ",".join("1" * 16), "sd1", "'a'"),
        ("nan," + ",".join("1" * 16), "sd1", "out of bounds"),
        ("IN99=1", "sd1", "IN99"),
        ("IN11=1", "sdxl", "IN11"),
        ("IN05-IN02=1", "sd1", "backwards"),
        ("IN05-XX=1", "sd1", "XX"),
        ("IN05==1", "sd1", "'=1'"),
        ("IN05", "sd1", "IN05"),
        ("OUTS", "flux", "OUTS"),
        ("1,1", "sd3", "no numbers"),
    ],
)
def test_what_cannot_be_meant_is_refused(text, architecture, complaint):
    with pytest.raises(SpecError) as caught:
        parse(text, architecture)
    assert complaint in str(caught.value)
