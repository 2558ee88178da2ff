"""Parameters of the library become flags of a command, and nothing else does."""

import re
from pathlib import Path

import pytest

import svfit_dreambooth
from svfit_dreambooth.commands.wording import with_dashes

NAMES = ["learning_rate", "rank", "output_dir", "class_data_dir", "text_encoder_lr"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lower learning_rate, or leave it.", "lower --learning_rate, or leave it."),
        ("choose another output_dir.", "choose another --output_dir."),
        ("output_dir /home/output_dir/x cannot be", "--output_dir /home/output_dir/x cannot be"),
        ("the name 'learning_rate' and learning_rates", "the name 'learning_rate' and learning_rates"),
        ("see output_dir.txt and my-output_dir", "see output_dir.txt and my-output_dir"),
        ("--output_dir stays", "--output_dir stays"),
        ("rank is '0', the rank", "rank is '0', the rank"),
        ("text_encoder is no option", "text_encoder is no option"),
    ],
)
def test_names_of_several_words_are_found_where_they_stand_alone(text, expected):
    assert with_dashes(text, NAMES) == expected


def test_single_words_are_found_where_they_are_marked():
    assert with_dashes("rank is 'rank': leave rank out.", NAMES, ["rank"]) == "--rank is 'rank': leave --rank out."
    assert with_dashes("rank is 0", ["learning_rate"], ["rank"]) == "rank is 0"  # the command has no such option


def test_the_library_knows_no_flags():
    """Only command lines do: the page and Python speak of parameters."""
    package = Path(svfit_dreambooth.__file__).parent
    allowed = {
        package / "web" / "page.py",
        package / "web" / "rooms" / "launch.py",
        package / "web" / "rooms" / "bases.py",
    }
    found = []
    for path in package.rglob("*.py"):
        if path.is_relative_to(package / "commands") or path in allowed:
            continue
        for line in re.sub(r'""".*?"""|#.*', "", path.read_text(encoding="utf-8"), flags=re.DOTALL).splitlines():
            if re.search(r"(?<![\w(-])--[a-z{][a-z_]+", line) and "var(--" not in line:
                found.append(f"{path.name}: {line.strip()}")
    assert not found


def test_the_end_of_a_run_names_the_flag_that_keeps_the_last_step():
    said = with_dashes("kept: step 6, the best of those measured (keep last for the last)", {"keep"}, ["keep"])
    assert said == "kept: step 6, the best of those measured (--keep last for the last)"
