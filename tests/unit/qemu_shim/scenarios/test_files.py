"""A user's file: what is wrong with it is said in a sentence, status 2; its scenario is a command."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_shim import cli
from qemu_shim.scenarios.files import BadFile, is_file, scenario_of, told
from qemu_shim.scenarios.scenario import Param
from qemu_shim.study.campaign.plan import BadPlan, Plan
from qemu_shim.study.campaign.point import Point
from qemu_shim.vmm.designs import DESIGNS

HEAD = "from qemu_shim.api import Context, Param, scenario\n"
GOOD = f'''"""Of the file."""
{HEAD}
@scenario(devices=2, options={{"kvmd": ("--no-pml",)}}, pages=Param(4, 1, 9, "pages that are used"))
async def my_own(ctx: Context) -> None:
    """It is mine.

    And this is its story.
    """
'''
SECOND = """
@scenario(designs=("shared",))
async def another(ctx: Context) -> None:
    pass
"""


def written(directory: Path, text: str, name: str = "mine.py") -> str:
    path = directory / name
    path.write_text(text)
    return str(path)


def test_a_file_is_told_from_a_name() -> None:
    assert [is_file(name) for name in ("mine.py", "a/b.py:two", "dmatest", "dsa-ops", "plan.toml")] == [
        *(True, True),
        *(False, False, False),
    ]


def test_a_function_is_a_scenario_with_its_name_docstring_parameters_and_options(tmp_path: Path) -> None:
    mine = scenario_of(written(tmp_path, GOOD))
    assert (mine.name, mine.summary) == ("my-own", "It is mine")
    assert mine.help.endswith("story.")
    assert mine.params == {"pages": Param(4, 1, 9, "pages that are used")}
    assert mine.options == {"kvmd": ("--no-pml",), "device_sim": ("--devices", "2")}
    assert mine.playable == list(DESIGNS)


def test_of_several_one_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD + SECOND)
    another = scenario_of(f"{path}:another")
    assert (another.playable, another.summary) == (["shared"], "Of the file")
    with pytest.raises(BadFile, match=r"has 2 scenarios: say .*:my-own or .*:another$"):
        scenario_of(path)
    with pytest.raises(BadFile, match=r"has no scenario 'third', only my-own, another"):
        scenario_of(f"{path}:third")


WRONG = [
    (None, "there is no such file"),
    ("x = 1\n", "has no scenario: put @scenario"),
    ("def f(:\n", "cannot be imported: SyntaxError"),
    ("x = 1\ny = 1 / 0\n", "cannot be imported: line 2: ZeroDivisionError: division by zero"),
    ("import nothing_of_this_name\n", "line 1: ModuleNotFoundError: No module named 'nothing_of_this_name'"),
    (GOOD + SECOND.replace("(", "(name='my-own', ", 1), "has two of the name my-own"),
    (
        GOOD.replace("Param(4, 1, 9,", "(4, 1, 9,"),
        "TypeError: pages=(4, 1, 9, 'pages that are used'): a param",
    ),
    (
        GOOD.replace("devices=", "devicess="),
        "line 4: TypeError: devicess=2: a parameter is a Param(default, ",
    ),
    (GOOD.replace("kvmd", "kvmdd"), "options for 'kvmdd': there is no such daemon, only kvmd, device_sim, "),
    (HEAD + SECOND.replace("shared", "shard"), "another names designs that are not there: shard; there are "),
]


@pytest.mark.parametrize(("text", "why"), WRONG, ids=[why for _, why in WRONG])
@pytest.mark.parametrize("command", ["run", "compare", "campaign"])
def test_what_is_wrong_with_a_file_is_said_and_the_status_is_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, text: str | None, why: str
) -> None:
    path = str(tmp_path / "gone.py") if text is None else written(tmp_path, text)
    with pytest.raises(SystemExit) as ended:
        cli.main([command, path])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert path in error
    assert why in error


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["run", "--pages", "10"], "10 is not in 1..9"),
        (["run", "--sheets", "1"], "unrecognized arguments"),
        (["compare", "--pages", "0"], "0 is not in 1..9"),
    ],
)
def test_its_parameters_are_options_within_their_bounds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], why: str
) -> None:
    command, *options = argv
    with pytest.raises(SystemExit) as ended:
        cli.main([command, written(tmp_path, GOOD), *options])
    assert ended.value.code == 2
    assert why in capsys.readouterr().err


def test_help_is_the_docstring_and_the_parameters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", written(tmp_path, GOOD), "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "And this is its story." in text
    assert "pages that are used (default 4, 1..9)" in text


def test_a_parameter_of_an_options_name_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", written(tmp_path, GOOD.replace("pages=", "dump="))])
    assert ended.value.code == 2
    assert "its parameter dump is an option of the command" in capsys.readouterr().err


def test_a_campaign_plays_a_files_scenario_on_the_designs_it_can_be_played_on(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD + SECOND)
    points = Plan([f"{path}:another", f"{path}:my-own"], seeds=(1,), params={"pages": [2, 3]}).points()
    assert [(point.workload[len(path) :], point.design) for point in points] == [
        (":another", "shared"),
        *[(":my-own", design) for _ in range(2) for design in DESIGNS],
    ]
    with pytest.raises(LookupError, match="cannot be played on mirror, only on shared"):
        Point.of(f"{path}:another", "mirror", 1)
    with pytest.raises(BadPlan, match="there is no such file"):
        Plan([str(tmp_path / "gone.py")]).points()


def test_a_design_of_the_file_joins_the_others(tmp_path: Path) -> None:
    scenarios = GOOD + SECOND.replace("shared", "theirs")
    text = "from dataclasses import replace\nfrom qemu_shim.api import DESIGNS\n" + scenarios
    path = written(tmp_path, text + '\nTHEIRS = replace(DESIGNS["mirror"], name="theirs")\n')
    try:
        assert scenario_of(f"{path}:my-own").playable[-1] == "theirs"
        assert scenario_of(f"{path}:another").playable == ["theirs"]
    finally:
        DESIGNS.pop("theirs", None)


def test_a_mistake_of_the_scenarios_own_is_told_by_its_line(tmp_path: Path) -> None:
    path = written(tmp_path, "def wrong():\n    return {}['key']\n")
    namespace: dict[str, object] = {}
    exec(compile(Path(path).read_text(), path, "exec"), namespace)
    wrong = namespace["wrong"]
    assert callable(wrong)
    with pytest.raises(KeyError) as raised:
        wrong()
    assert told(raised.value, path) == f"{path}: line 2: KeyError: 'key'"
