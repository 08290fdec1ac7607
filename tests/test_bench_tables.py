"""Tables and plots of a benchmark."""

import csv
import math
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from bench_runs import fake_result, folder_of_results
from matplotlib.axes import Axes
from PIL import Image

from ddm_training.errors import InputError
from diffusionerf_ns.bench import peers, pictures, results, summary, table, variants
from diffusionerf_ns.bench.jobs import Job, make_jobs
from diffusionerf_ns.bench.plot import draw_plots
from diffusionerf_ns.dataparsers.base import Source


def test_scenes_weigh_equally_and_the_deviation_is_over_seeds(tmp_path: Path) -> None:
    values = {("fern", 0): 10.0, ("fern", 1): 14.0, ("room", 0): 20.0, ("room", 1): 22.0}
    jobs = make_jobs([Path("fern"), Path("room")], views=[3], seeds=[0, 1], variant_names=["full"])
    rows = [fake_result(job, "h", psnr=values[job.scene, job.seed], ssim=0.5) for job in jobs]
    ((_, (row,)),) = summary.summarise_runs(rows).items()
    assert row.means["psnr"].value == pytest.approx((12.0 + 21.0) / 2)
    assert row.means["psnr"].deviation == pytest.approx(math.sqrt(((15.0 - 16.5) ** 2 + (18.0 - 16.5) ** 2) / 1))
    # A seed that only one scene has must not shift the weights of the scenes, nor count in the deviation.
    more = fake_result(Job(scene="fern", data="fern", views=3, variant="full", seed=2), "h", psnr=18.0, ssim=0.5)
    ((_, (row,)),) = summary.summarise_runs([*rows, more]).items()
    assert row.means["psnr"].value == pytest.approx((14.0 + 21.0) / 2)
    assert row.means["psnr"].deviation == pytest.approx(math.sqrt(4.5))


def test_runs_of_other_protocols_sizes_or_lengths_are_never_averaged(tmp_path: Path) -> None:
    job = Job(scene="fern", data="fern", views=3, variant="full")
    base = fake_result(job, "h", psnr=10.0, ssim=0.5)
    changed = [base | {"protocol": "nerfstudio"}, base | {"image_size": [252, 189]}, base | {"steps": 50}]
    assert len(summary.summarise_runs([base, *changed])) == 4


def test_every_kind_of_capture_has_a_heading_of_its_own() -> None:
    assert sorted(summary.DATASETS) == sorted(get_args(Source))
    assert len(set(summary.DATASETS.values())) == len(summary.DATASETS)


def test_tables_put_published_numbers_beside_ours_and_name_what_is_missing(tmp_path: Path) -> None:
    jobs = make_jobs([Path("fern"), Path("room")], views=[3], seeds=[0], variant_names=["photometric", "full"])
    missing = jobs[-1]
    root = folder_of_results(tmp_path, jobs, lambda job: None if job == missing else 20.125)
    text = table.write_tables(root, root)
    assert text == (root / "table.md").read_text()
    assert "| **photometric only** | 20.12 | 0.500 | 0.300 | 2 | 1 |" in text
    assert "| DiffusioNeRF (published) | 19.79 | 0.568 | 0.338 |" in text
    assert "Protocol `llff-regnerf`" in text
    assert f"1 of 4 jobs are not in these means: {missing.name} (missing)" in text
    assert "| diffusionerf-tiny | 100 | photometric only | 2 | 5 | 0.05 |" in (root / "times.md").read_text()
    with (root / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["origin"] for row in rows} == {"ours", "published"}
    assert all(row["source"] for row in rows if row["origin"] == "published")
    with (root / "jobs.csv").open() as file:
        assert [row["seconds_train"] for row in csv.DictReader(file)] == ["5.0"] * 3


def test_the_ablation_is_over_the_scenes_that_all_of_its_rows_have(tmp_path: Path) -> None:
    names = ["photometric", "full", "tau-zero", "default", "nerfacto"]
    jobs = make_jobs([Path("fern"), Path("room")], views=[3], seeds=[0, 1], variant_names=names)
    psnr = {"photometric": 15.0, "full": 20.0, "tau-zero": 18.0, "default": 21.0, "nerfacto": 1.0}
    left_out = {("room", "tau-zero"), ("fern", "default")}

    def value(job: Job) -> float | None:
        if (job.scene, job.variant) in left_out or (job.seed == 1 and job.variant != "full"):
            return None
        return psnr[job.variant] + (10.0 if job.scene == "room" else 0.0) + 2.0 * job.seed

    root = folder_of_results(tmp_path, jobs, value)
    text = table.write_tables(root, root)
    ablation = text[text.index("Ablation, means over fern (") : text.index("Notes:")].splitlines()
    assert ablation[2] == "|  | PSNR | SSIM | LPIPS-VGG | seeds | the paper's row | its Average |"
    assert ablation[4:7] == [
        "| photometric only | 15.00 | 0.500 | 0.300 | 1 | DiffusioNeRF, photometric only | 0.210 |",
        "| full: score in training as well | 21.00 | 0.500 | 0.300 | 2 | DiffusioNeRF | 0.127 |",
        "| tau = 0 throughout | 18.00 | 0.500 | 0.300 | 1 | DiffusioNeRF, tau = 0 | 0.137 |",
    ]
    left_out.discard(("fern", "default"))
    root = folder_of_results(tmp_path / "with the preset", jobs, value)
    assert "| as the preset has it | 21.00 | 0.500 | 0.300 | 1 |  |  |" in table.write_tables(root, root)
    left_out |= {("fern", "full"), ("fern", "photometric")}
    root = folder_of_results(tmp_path / "none in common", jobs, value)
    assert "Ablation" not in table.write_tables(root, root)
    left_out.clear()
    alone = folder_of_results(tmp_path / "alone", jobs[:1], value)
    assert "Ablation" not in table.write_tables(alone, alone)


def test_published_numbers_stand_only_beside_their_own_protocol() -> None:
    job = Job(scene="fern", data="fern", views=3, variant="full")
    setting = next(iter(summary.summarise_runs([fake_result(job, "h", psnr=1.0, ssim=0.5)])))
    assert table._peers_of(setting, peers.read_peers())
    other = summary.Setting(**(vars(setting) | {"protocol": "nerfstudio"}))
    assert table._peers_of(other, peers.read_peers()) == []


def test_the_peers_file_holds_every_published_row_with_a_source() -> None:
    published = peers.read_peers()
    assert all(peer.source and peer.metrics for peer in published)
    found = {(p.method, p.dataset, p.views): p.metrics for p in published}
    assert found["CAT3D", "dtu", "9"] == {"psnr": 25.92, "ssim": 0.928, "lpips_vgg": 0.073}
    assert found["DiffusioNeRF, tau = 0", "llff", "3"] == {"average": 0.137}
    complete = {p.method for p in published if "psnr" in p.metrics}
    assert all((m, d, v) in found for m in complete for d in ("llff", "dtu") for v in "369")
    assert {v.ablation for v in variants.VARIANTS.values()} - {None} <= {p.method for p in published}


def test_tables_name_the_overrides_that_nerfacto_did_not_take(tmp_path: Path) -> None:
    given = {"pipeline.model.far_plane": 10.0, "pipeline.model.refine_tau": 0.1}
    jobs = [Job(scene="fern", data="fern", views=3, variant=name, overrides=given) for name in ("full", "nerfacto")]
    root = folder_of_results(tmp_path, jobs, lambda _: 20.0)
    for job, model in zip(jobs, ({"far_plane": 10.0, "refine_tau": 0.1}, {"far_plane": 10.0})):
        content = results.read_result(root / job.name)
        assert content is not None
        content["config"] = {"pipeline": {"model": model}}
        results.write_json(root / job.name / results.RESULT_FILE, content)
    text = table.write_tables(root, root)
    assert (
        "* Overrides beside the variants': [('pipeline.model.far_plane', 10.0), ('pipeline.model.refine_tau', 0.1)]; "
        "[('pipeline.model.far_plane', 10.0)].\n"
    ) in text
    assert "* Overrides that nerfacto did not take: pipeline.model.refine_tau.\n" in text


def few_images(root: Path, count: int) -> Path:
    """Results of captures of so many images without lists: those that do not train are tested on, else all are."""
    for entry in results.read_entries(root):
        content = entry.result()
        assert content is not None
        ids = range(count)
        train = list(ids[: entry.job.views]) if isinstance(entry.job.views, int) else list(ids)
        test = [i for i in ids if i not in train] or train
        listed = {kind: [{"id": i, "name": f"{i}.png"} for i in of] for kind, of in (("train", train), ("test", test))}
        images = [{"name": f"{i}.png", "metrics": content["metrics"]} for i in test]
        changes = {"split": listed, "images": images, "dataset": "transforms", "protocol": "nerfstudio"}
        results.write_json(entry.folder / results.RESULT_FILE, content | changes)
    return root


def test_metrics_of_training_images_are_told_from_those_of_held_out_ones(tmp_path: Path) -> None:
    jobs = make_jobs([Path("desk")], views=[3, 6, 9, "all"], seeds=[0], variant_names=["full"])
    root = few_images(folder_of_results(tmp_path, jobs, lambda _: 20.0), 9)
    text = table.write_tables(root, root)
    assert "* In 2 of 4 runs no image was held out: their metrics are of the training images themselves" in text
    assert "say nothing about new views (desk, 9 views; desk, all views)." in text
    with (root / "jobs.csv").open() as file:
        rows = {row["views"]: (row["test_images"], row["test_is_train"]) for row in csv.DictReader(file)}
    assert rows == {"3": ("6", "False"), "6": ("3", "False"), "9": ("9", "True"), "all": ("9", "True")}
    held_out = few_images(folder_of_results(tmp_path / "held out", jobs[:2], lambda _: 20.0), 9)
    assert "held out" not in table.write_tables(held_out, held_out)


def test_the_plot_of_test_images_has_no_training_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[tuple[float, ...]] = []
    errorbar = Axes.errorbar
    monkeypatch.setattr(Axes, "errorbar", lambda axes, x, y, **how: (drawn.append(x), errorbar(axes, x, y, **how))[1])
    jobs = make_jobs([Path("desk")], views=[3, 6, 9], seeds=[0], variant_names=["full"])
    for count, views in ((9, (3, 6)), (10, (3, 6, 9))):
        drawn.clear()
        root = few_images(folder_of_results(tmp_path / str(count), jobs, lambda _: 20.0), count)
        draw_plots(root, root / "plots")
        assert drawn == [views]
        assert ("1 of 3 runs had no image held out" in " ".join(capsys.readouterr().out.split())) == (count == 9)
    alone = few_images(folder_of_results(tmp_path / "alone", jobs[-1:], lambda _: 20.0), 9)
    assert [path.name for path in draw_plots(alone, alone / "plots")] == ["curves-desk-9-views.png"]


def test_means_over_different_scenes_are_not_shown_as_if_they_could_be_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, tuple[float, ...]] = {}
    monkeypatch.setattr(Axes, "errorbar", lambda axes, x, y, *, label, **_: drawn.update({label: x}))
    jobs = make_jobs([Path("fern"), Path("room")], views=[3, 6, 9], seeds=[0], variant_names=["full", "nerfacto"])
    missing = {("room", 9, "full"), ("room", 3, "nerfacto"), ("room", 6, "nerfacto"), ("room", 9, "nerfacto")}
    told = "Not all rows have the same scenes"
    for left_out, where in ((set(), 0), (missing, 2)):
        drawn.clear()
        root = folder_of_results(
            tmp_path / str(where),
            jobs,
            lambda job, of=left_out: None if (job.scene, job.views, job.variant) in of else 20.0,
        )
        assert table.write_tables(root, root).count(told) == where  # of 9 views both rows are of fern alone
        draw_plots(root, root / "plots")
        lines = sorted((label.rsplit(", ", 1)[1], x) for label, x in drawn.items())
        if left_out:
            assert lines == [("2 scenes)", (3, 6)), ("fern)", (3, 6, 9)), ("fern)", (9,))]
        else:
            assert lines == [("2 scenes)", (3, 6, 9))] * 2


def test_a_table_of_nothing_is_refused(tmp_path: Path) -> None:
    root = folder_of_results(tmp_path, [Job(scene="a", data="a", views=3, variant="full")], lambda _: None)
    with pytest.raises(InputError, match="none of its 1 jobs is done"):
        table.write_tables(root, root)


def test_depth_colours_keep_one_range_and_show_unknown_depth_as_black() -> None:
    z = np.array([[1.0, 2.0, 4.0, 0.0]])
    colors = pictures.color_depth(z, (1.0, 4.0))
    assert tuple(colors[0, 3]) == (0, 0, 0)
    assert len({tuple(c) for c in colors[0]}) == 4
    assert (pictures.color_depth(z * 2, (2.0, 8.0)) == colors).all()
    low, high = pictures.depth_limits([np.linspace(1, 5, 101)[None], np.zeros((3, 4))])
    assert (low, high) == pytest.approx((1.08, 4.92))


def test_plots_are_drawn_for_every_scene_and_data_set(tmp_path: Path) -> None:
    jobs = make_jobs([Path("fern")], views=[3, 6], seeds=[0, 1], variant_names=["full", "nerfacto"])
    root = folder_of_results(tmp_path, jobs, lambda job: float(job.views) + job.seed)
    names = [path.name for path in draw_plots(root, root / "plots")]
    assert names == ["psnr-llff.png", "curves-fern-3-views.png", "curves-fern-6-views.png"]
    for name in names:
        with Image.open(root / "plots" / name) as image:
            assert np.asarray(image).std() > 5
