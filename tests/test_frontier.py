"""The frontier benchmark: what it measures against, its adapters to other libraries, its report, its command."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from torch import Tensor

from benchmarks import frontier
from benchmarks.baselines import dense_filter
from benchmarks.frontier import (
    BRUTE_FORCE,
    METHODS,
    Problem,
    brute_force,
    errors,
    growth,
    measure,
    one_thread,
    problems,
)
from benchmarks.peers import PEERS, UNUSABLE
from benchmarks.photos import HELD_OUT, SIGMA_RGB, TUNED, photo, probabilities, sigma_xy, truth
from segloss.bilateral import ToleranceError, guide_features
from segloss.bilateral.reference import gaussian_filter_reference
from tests.forked import run

ROOT = Path(__file__).parents[1]
ROW = {
    "photo": str,
    "side": int,
    "classes": int,
    "tuned": bool,
    "method": str,
    "status": str,
    "note": str,
    "normalised": bool,
    "within": bool | None,
    "seconds": float | None,
    "spread": float | None,
    "rounds": int | None,
    "time_ratio": float | None,
    "error": float | None,
    "error_scaled": float | None,
    "megabytes": float | None,
}
# As it is, and after the best constant factor: lattices only approximate the filter.
LARGEST_ERROR = {"KeOps": (1e-5, 1e-5), "pydensecrf lattice": (0.6, 0.15), "Simplex-GP lattice": (0.4, 0.2)}


def exact(image: Tensor, values: Tensor) -> Tensor:
    """By the dense definition in float64, ``[N, K]``."""
    features = guide_features(image.double(), SIGMA_RGB, sigma_xy(image.shape[2]))
    return gaussian_filter_reference(values.double().flatten(2), features)[0].t()


def nothing(_: str) -> None:
    pass


@pytest.mark.parametrize("name", TUNED + HELD_OUT)
def test_photographs_are_local_colour_images_in_range(name: str) -> None:
    image = photo(name, 16)
    assert image.shape == (1, 3, 16, 16)
    assert image.dtype == torch.float32
    assert 0 <= image.min() < image.max() <= 1
    assert (image[:, 0] - image[:, 2]).abs().max() > 0.05


def test_truth_is_the_dense_definition() -> None:
    image, values, pixels = photo("china", 20), probabilities(3, 20), torch.tensor([7, 399, 0])
    filtered, sums = truth(image, values, pixels)
    torch.testing.assert_close(filtered, exact(image, values)[pixels])
    torch.testing.assert_close(sums, exact(image, torch.ones(1, 1, 20, 20))[pixels, 0])


def test_brute_force_is_the_baseline_and_a_share_of_its_rows() -> None:
    image, values, pixels = photo("china", 20)[0], probabilities(3, 20)[0], torch.randperm(400)[:37]
    features = guide_features(image[None], SIGMA_RGB, sigma_xy(20))[0].t().contiguous()
    expected = dense_filter(values.flatten(1).t().contiguous(), features)
    torch.testing.assert_close(brute_force(values, image, SIGMA_RGB, sigma_xy(20)).flatten(1).t(), expected)
    torch.testing.assert_close(brute_force(values, image, SIGMA_RGB, sigma_xy(20), pixels), expected[pixels])


def test_a_constant_factor_is_an_error_that_the_best_constant_takes_away() -> None:
    values = torch.rand(50, 3, dtype=torch.float64)
    plain, scaled = errors(values / 4, values)
    assert plain == pytest.approx(0.75)
    assert scaled < 1e-12


def test_only_the_first_photograph_is_filtered_at_all_sizes_and_numbers_of_channels() -> None:
    todo = problems(["a", "b"], [256, 128], [1, 21])
    assert todo == [Problem("a", 128, 21), Problem("a", 256, 21), Problem("b", 256, 21), Problem("a", 256, 1)]
    assert problems(["a"], [8, 16, 32], [3]) == [Problem("a", 8, 3), Problem("a", 16, 3), Problem("a", 32, 3)]


def test_growth_is_the_exponent_in_the_number_of_pixels() -> None:
    rows = [
        {"method": "m", "photo": "a", "classes": 3, "side": side, "seconds": 1e-9 * side**3} for side in (16, 32, 64)
    ]
    rows += [{"method": "m", "photo": "b", "classes": 3, "side": 64, "seconds": 1.0}]
    rows += [{"method": "once", "photo": "a", "classes": 3, "side": 64, "seconds": 1.0}]
    assert growth(rows) == {"m": pytest.approx(1.5)}


def test_measures_in_one_thread_and_puts_the_number_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_a_refusal_is_recorded_with_its_reason() -> None:
    def refusing(*_: object) -> Tensor:
        raise ToleranceError("estimate 0.3")

    rows = measure(Problem("noise", 24, 2), {BRUTE_FORCE: brute_force, "lowrank 1e-2": refusing}, 2, [], nothing)
    assert [(row["status"], row["note"]) for row in rows] == [("measured", ""), ("refused", "estimate 0.3")]
    assert rows[1]["seconds"] is None


def test_an_exact_method_that_is_not_stops_the_benchmark() -> None:
    def wrong(*arguments: Tensor) -> Tensor:
        return 1.01 * METHODS["exact"](*arguments)

    with pytest.raises(frontier.Wrong, match="exact: expected an error of at most 1e-04, got"):
        measure(Problem("china", 24, 2), {BRUTE_FORCE: brute_force, "exact": wrong}, 1, [], nothing)


def test_an_error_above_the_tolerance_is_marked() -> None:
    def loose(*arguments: Tensor) -> Tensor:
        return 1.05 * METHODS["exact"](*arguments)

    filters = {BRUTE_FORCE: brute_force, "lowrank 4e-2": loose, "lowrank 1e-1": loose}
    rows = measure(Problem("china", 24, 2), filters, 1, [], nothing)
    assert [row["within"] for row in rows] == [True, False, True]
    assert "5.0e-02 above its tolerance" in "\n".join(frontier.problem_tables(rows))


def test_what_would_take_too_long_is_not_run() -> None:
    known = [{"photo": "china", "method": "exact", "side": 8, "classes": 2, "seconds": 1.0}]
    rows = measure(Problem("china", 24, 2), {BRUTE_FORCE: brute_force, "exact": METHODS["exact"]}, 1, known, nothing)
    assert [(row["status"], row["note"]) for row in rows] == [("measured", ""), ("not run", "would take about 81 s")]


def report(rows: list[dict[str, object]]) -> dict[str, object]:
    where = {"date": "today", "processor": "one", "instructions": "none", "torch": "2"}
    return {
        "environment": where,
        "settings": {"rounds": 1, "share": 2048, "shared_side": 24, "shared_classes": 2},
        "results": rows,
        "growth": {BRUTE_FORCE: 2.0},
        "peers": {"KeOps": {"package": "pykeops", "version": "1", "note": "exact"}},
        "skipped": {"other": "does not build"},
        "first_call_seconds": {BRUTE_FORCE: 0.5},
    }


def test_the_report_has_wins_and_losses_refusals_and_peers_left_out(tmp_path: Path) -> None:
    def refusing(*_: object) -> Tensor:
        raise ToleranceError("estimate 0.3")

    filters = {BRUTE_FORCE: brute_force, "exact": METHODS["exact"], "lowrank 1e-2": refusing}
    rows = [row for name in ("china", "astronaut") for row in measure(Problem(name, 24, 2), filters, 1, [], nothing)]
    for row in rows:
        assert row.keys() == ROW.keys()
        assert all(isinstance(row[key], kind) for key, kind in ROW.items())
    table = frontier.markdown(report(rows))
    assert "| lowrank 1e-2 | - | - | - | - | 0 | 2 | 0 |" in table
    assert "| lowrank 1e-2 | refused: estimate 0.3 |" in table
    assert "- KeOps (pykeops 1): exact." in table
    assert "- other, not compared: does not build." in table
    assert table.index("## china 24x24, K=2") < table.index("## astronaut 24x24, K=2")
    frontier.picture(rows, 24, tmp_path / "frontier.png")
    panels = imread(tmp_path / "frontier.png")
    assert panels.shape[1] > 600
    assert panels.std() > 0.05


def test_the_picture_has_a_mark_for_each_family_of_methods_and_each_peer(tmp_path: Path) -> None:
    rows = [frontier.new_row(method, Problem("china", 24, 2), "") for method in (*METHODS, *PEERS)]
    frontier.picture([row | {"time_ratio": 1.0, "error": 0.1} for row in rows], 24, tmp_path / "frontier.png")
    assert imread(tmp_path / "frontier.png").std() > 0.05


def windowed(name: str, image: Tensor, values: Tensor, side: int) -> Tensor:
    """What the filters of a window compute, normalised, ``[N, K]``."""
    colour, grid = image[0].double().flatten(1), torch.cartesian_prod(*2 * [torch.arange(side).double()])
    apart = (grid[:, None] - grid).abs()
    reach = int(sigma_xy(side))
    if name == "OpenCV window":
        inside, distance = apart.norm(dim=2) <= reach, (colour[:, :, None] - colour[:, None]).abs().sum(0)
    else:
        inside, distance = (apart <= reach).all(2), (colour[:, :, None] - colour[:, None]).norm(dim=0)
    place = apart.square().sum(2) / (2 * sigma_xy(side) ** 2)
    weights = inside * torch.exp(-(distance**2) / (2 * SIGMA_RGB**2) - place)
    return weights @ values[0].flatten(1).double().t() / weights.sum(1, keepdim=True)


@pytest.mark.slow  # some compile when first used
@pytest.mark.filterwarnings("ignore")  # other libraries' warnings are not ours
@pytest.mark.parametrize("name", PEERS)
def test_the_adapter_of_a_peer_asks_for_the_right_filter(name: str) -> None:
    try:
        run = PEERS[name].load()
    except ImportError as error:
        pytest.skip(f"cannot be imported: {error}")
    side = 40
    image, values = photo("china", side), probabilities(2, side)
    filtered = run(values[0], image[0], SIGMA_RGB, sigma_xy(side))
    assert filtered.shape == values[0].shape
    columns = filtered.flatten(1).t().double()
    if PEERS[name].normalised:
        margin = int(sigma_xy(side))
        inner = torch.zeros(side, side, dtype=torch.bool)
        inner[margin:-margin, margin:-margin] = True  # elsewhere they differ in what lies beyond the border
        expected = windowed(name, image, values, side)
        torch.testing.assert_close(columns[inner.flatten()], expected[inner.flatten()], rtol=2e-3, atol=1e-4)
        return
    plain, scaled = errors(columns, exact(image, values))
    assert plain < LARGEST_ERROR[name][0]
    assert scaled < LARGEST_ERROR[name][1]
    if PEERS[name].by_rows:
        pixels = torch.randperm(side**2)[:100]
        share = run(values[0], image[0], SIGMA_RGB, sigma_xy(side), pixels)
        torch.testing.assert_close(share, filtered.flatten(1).t()[pixels])


command = partial(run, "-m", "benchmarks.frontier")


@pytest.mark.slow
def test_the_command_writes_three_files_and_prints_the_table(tmp_path: Path) -> None:
    done = command("--quick", "--photos", "noise", "rocket", "--out", str(tmp_path / "new"))
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "new" / "frontier.json").read_text())
    assert {"date", "torch", "processor", "threads", "load"} <= written["environment"].keys()
    assert written["environment"]["threads"] == 1
    rows = written["results"]
    assert {row["method"] for row in rows} == set(METHODS) | set(written["peers"])
    assert len(rows) == 3 * len({row["method"] for row in rows})
    for row in rows:
        assert row.keys() == ROW.keys()
        assert all(isinstance(row[key], kind) for key, kind in ROW.items()), row
        assert row["status"] in ("measured", "refused", "not run")
        assert (row["status"] == "measured") == (row["seconds"] is not None) == (row["error"] is not None)
        assert (row["status"] == "measured") == (row["note"] == "")
    assert set(PEERS) <= set(written["peers"]) | set(written["skipped"])
    assert UNUSABLE.items() <= written["skipped"].items()
    assert (tmp_path / "new" / "frontier.md").read_text() in done.stdout
    assert imread(tmp_path / "new" / "frontier.png").ndim == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--photos", "moon"], "argument --photos: invalid choice: 'moon'"),
        (["--sides", "0"], "argument --sides: expected a whole number above 0, got 0"),
        (["--out", "{file}/folder"], "--out: expected a folder that can be written, got"),
    ],
)
def test_errors_of_the_command_are_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "file").touch()
    done = command(*(argument.format(file=tmp_path / "file") for argument in arguments))
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
