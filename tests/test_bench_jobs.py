"""Jobs of a benchmark, their configurations, and the folder of its results."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from bench_runs import fake_result, make_job, small_prior

from ddm_training.errors import InputError
from diffusionerf_ns.bench import results, variants, worker
from diffusionerf_ns.bench.jobs import config_hash, configure, describe, make_jobs, read_jobs
from diffusionerf_ns.bench.run import RunConfig, VariantName, parse_overrides


def test_the_job_list_is_all_scenes_times_views_times_variants_times_seeds(tmp_path: Path) -> None:
    jobs = make_jobs(
        [tmp_path / "a", tmp_path / "b"], views=[3, "all"], seeds=[0, 1, 2], variant_names=["full", "nerfacto"]
    )
    assert len({job.name for job in jobs}) == len(jobs) == 2 * 2 * 3 * 2
    path = tmp_path / "jobs.json"
    path.write_text(json.dumps([job.to_dict() for job in jobs]))
    assert read_jobs(path) == jobs


def test_bad_job_lists_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="different names"):
        make_jobs([tmp_path / "x/fern", tmp_path / "y/fern"], views=[3], seeds=[0], variant_names=["full"])
    with pytest.raises(InputError, match=r"'fast' is unknown; known are photometric.*nerfacto"):
        make_jobs([tmp_path / "a"], views=[3], seeds=[0], variant_names=["fast"])
    path = tmp_path / "jobs.json"
    path.write_text('[{"scene": "a", "colour": 3}]')
    with pytest.raises(InputError, match="known entries"):
        read_jobs(path)
    path.write_text("[")
    with pytest.raises(InputError, match="cannot be read"):
        read_jobs(path)


@pytest.mark.parametrize(
    ("doubled", "message"),
    [
        ({"seeds": [0, 1, 0]}, "--seeds has 0 several times"),
        ({"views": [3, "all", "all"]}, "--views has all several times"),
        ({"variant_names": ["full", "full"]}, "--variants has full several times"),
    ],
)
def test_two_jobs_of_one_name_are_refused(tmp_path: Path, doubled: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_jobs([tmp_path / "a"], **({"views": [3], "seeds": [0], "variant_names": ["full"]} | doubled))


def test_variants_change_what_their_names_say_and_nothing_of_the_preset(tmp_path: Path) -> None:
    from diffusionerf_ns.config import diffusionerf_tiny

    before = describe(diffusionerf_tiny.config)
    models = {name: configure(make_job(tmp_path, variant=name), tmp_path).pipeline.model for name in variants.VARIANTS}
    manager = configure(make_job(tmp_path, variant="no-image-patches"), tmp_path).pipeline.datamanager
    weights = ("score_weight", "frustum_weight", "foreground_weight", "distortion_weight")
    assert [getattr(models["photometric"], w) for w in weights] == [0.0] * 4
    assert models["geometric"].score_weight == 0.0
    assert all(getattr(models["geometric"], w) == getattr(models["full"], w) > 0 for w in weights[1:])
    assert models["full"].score_weight > 0
    assert [models[name].refine_tau for name in ("photometric", "geometric", "no-refinement")] == [0.0] * 3
    assert models["full"].refine_tau == models["refinement-only"].refine_tau > 0
    assert models["photometric"].eval_samples_factor == 1
    preset: Any = diffusionerf_tiny.config.pipeline.model
    for name in (*weights, "refine_tau", "eval_samples_factor", "stereo_depth_weight"):
        assert getattr(models["default"], name) == getattr(preset, name)
    scored = ("full", "no-image-patches", "tau-zero", "no-refinement", "no-stereo")
    assert all(models[name].score_weight == 1.0 for name in scored)
    assert models["refinement-only"].score_weight == 0.0
    assert manager.image_patch_share == 0.0
    managers = {name: configure(make_job(tmp_path, variant=name), tmp_path).pipeline.datamanager for name in models}
    without = ("photometric", "paper-geometric", "geometric", "no-completion")
    assert [managers[name].completion for name in without] == ["membrane"] * 4
    assert managers["default"].completion == managers["full"].completion == "prior"
    assert models["paper-geometric"].stereo_depth_weight == models["paper-geometric"].completed_depth_weight == 0.0
    assert models["paper-geometric"].frustum_weight == models["geometric"].frustum_weight > 0.0
    assert (models["paper-geometric"].frustum_views, models["geometric"].frustum_views) == (2, 1)
    assert (models["tau-zero"].tau_start, models["tau-zero"].tau_end) == (0.0, 0.0)
    assert describe(diffusionerf_tiny.config) == before


def test_every_variant_can_be_asked_for_on_the_command_line() -> None:
    assert set(get_args(VariantName)) == set(variants.VARIANTS)


def test_nerfacto_has_the_sizes_of_ours_and_neither_prior_nor_camera_optimiser(tmp_path: Path) -> None:
    from nerfstudio.models.nerfacto import NerfactoModel

    changed = {"pipeline.model.num_levels": 7, "pipeline.datamanager.train_num_rays_per_batch": 99}
    ours = configure(make_job(tmp_path, overrides=changed), tmp_path)
    theirs = configure(make_job(tmp_path, overrides=changed, variant="nerfacto"), tmp_path)
    assert theirs.pipeline.model._target is NerfactoModel
    assert theirs.pipeline.model.camera_optimizer.mode == "off"
    for name in ("num_levels", "log2_hashmap_size", "num_nerf_samples_per_ray", "proposal_net_args_list"):
        assert getattr(theirs.pipeline.model, name) == getattr(ours.pipeline.model, name)
    assert theirs.pipeline.model.num_levels == 7
    assert theirs.pipeline.datamanager.train_num_rays_per_batch == 99
    assert theirs.pipeline.datamanager.dataparser == ours.pipeline.datamanager.dataparser
    assert describe(theirs.optimizers) == describe(ours.optimizers)


def test_nerfacto_takes_the_overrides_that_it_knows(tmp_path: Path) -> None:
    changed = {"pipeline.model.far_plane": 10.0, "pipeline.model.refine_tau": 0.1, "pipeline.model.num_levels": 7}
    model: Any = configure(make_job(tmp_path, overrides=changed, variant="nerfacto"), tmp_path).pipeline.model
    assert (model.far_plane, model.num_levels) == (10.0, 7)
    assert not hasattr(model, "refine_tau")


def test_the_number_of_steps_stretches_every_schedule(tmp_path: Path) -> None:
    config = configure(make_job(tmp_path, steps=200), tmp_path)
    whole = variants.base_config("diffusionerf-tiny")
    ratio = 200 / whole.max_num_iterations
    assert config.max_num_iterations == 200
    assert config.pipeline.model.proposal_warmup == round(whole.pipeline.model.proposal_warmup * ratio)
    for name, group in config.optimizers.items():
        assert group["scheduler"].max_steps == round(whole.optimizers[name]["scheduler"].max_steps * ratio)


def test_the_hash_sees_what_decides_the_result_and_nothing_else(tmp_path: Path) -> None:
    small_prior(tmp_path / "prior")

    def digest(folder: str = "a", **changes: Any) -> str:
        return config_hash(configure(make_job(tmp_path, **changes), tmp_path / folder))

    base = digest()
    assert digest(folder="b") == base
    moved = configure(make_job(tmp_path), tmp_path)
    moved.machine.device_type, moved.vis = "cuda", "viewer"
    assert config_hash(moved) == base
    others = [
        digest(steps=501),
        digest(seed=1),
        digest(views=6),
        digest(variant="geometric"),
        digest(variant="no-completion"),
        digest(overrides={"pipeline.datamanager.completion": "membrane"}),
        digest(variant="nerfacto"),
        digest(downscale_factor=2),
        digest(overrides={"pipeline.model.score_weight": 2.0}),
    ]
    assert len({base, *others}) == len(others) + 1


def test_the_hash_changes_with_the_content_of_the_prior(tmp_path: Path) -> None:
    from diffusionerf_ns.bench.jobs import prior_hash

    folder = small_prior(tmp_path / "prior")
    before = prior_hash(str(folder), None)
    prior_hash.cache_clear()
    spec = (folder / "rgbd.json").read_text()
    (folder / "rgbd.json").write_text(spec.replace('"steps": 0', '"steps": 1'))
    assert prior_hash(str(folder), None) != before


def test_the_hashes_change_with_the_network_that_completes_depth(tmp_path: Path) -> None:
    from diffusionerf_ns.bench.jobs import prior_hash, training_hash

    small_prior(tmp_path / "prior")
    other = small_prior(tmp_path / "other")
    named = {"pipeline.datamanager.completion_prior": str(other)}

    def digests(**changes: Any) -> tuple[str, str]:
        prior_hash.cache_clear()
        config = configure(make_job(tmp_path, **changes), tmp_path)
        return config_hash(config), training_hash(config)

    before, interpolated = digests(overrides=named), digests(variant="no-completion")
    (other / "completion").mkdir()
    (other / "completion" / "completion.json").write_text("{}")
    assert not set(digests(overrides=named)) & set(before)
    assert digests(variant="no-completion") == interpolated


def test_weights_with_a_metric_scale_are_not_those_without(tmp_path: Path) -> None:
    from diffusionerf_ns.bench.jobs import training_hash

    small_prior(tmp_path / "prior")

    def digest(**changes: Any) -> str:
        return training_hash(configure(make_job(tmp_path, **changes), tmp_path))

    assert digest(variant="geometric") != digest(variant="no-completion"), "it is found for the refinement alone"
    other = {"pipeline.model.refine_tau": 0.2}
    assert digest(variant="no-completion") == digest(variant="no-completion", overrides=other)
    assert digest(variant="full") == digest(variant="no-refinement"), "it is found for the score"


def test_overrides_are_read_as_json_or_text_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    assert parse_overrides(("pipeline.model.score-weight=2", "a.b=x/y", "c=[1, 2]")) == {
        "pipeline.model.score_weight": 2,
        "a.b": "x/y",
        "c": [1, 2],
    }
    with pytest.raises(InputError, match="PATH=VALUE"):
        parse_overrides(("score",))
    with pytest.raises(InputError, match="no such field"):
        configure(make_job(tmp_path, overrides={"pipeline.model.scroe_weight": 1}), tmp_path)


def test_overrides_may_be_spelt_as_python_does(tmp_path: Path) -> None:
    settings = (
        "pipeline.model.fill_unseen=False",
        "pipeline.model.patch_size=None",
        "pipeline.datamanager.cut_out_flat_background=True",
    )
    assert list(parse_overrides(settings).values()) == [False, None, True]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("pipeline.model.fill_unseen=no", "expected true or false, found the text 'no'"),
        ("pipeline.model.score_weight=0.5x", "expected a number, found the text '0.5x'"),
        ("pipeline.datamanager.train_num_rays_per_batch=many", "expected a number, found the text 'many'"),
    ],
)
@pytest.mark.parametrize("variant", ["full", "nerfacto"])
def test_an_override_of_another_kind_is_refused(tmp_path: Path, setting: str, expected: str, variant: str) -> None:
    job = make_job(tmp_path, overrides=parse_overrides((setting,)), variant=variant)
    with pytest.raises(InputError, match=rf"override '{setting.split('=')[0]}': {expected}"):
        configure(job, tmp_path)


@pytest.mark.parametrize(
    ("path", "flag"),
    [
        ("max_num_iterations", "--steps"),
        ("machine.seed", "--seeds"),
        ("pipeline.datamanager.dataparser.downscale_factor", "--downscale-factor"),
    ],
)
def test_an_override_of_what_a_flag_sets_is_refused(tmp_path: Path, path: str, flag: str) -> None:
    with pytest.raises(InputError, match=f"give {flag} instead"):
        configure(make_job(tmp_path, overrides={path: 4}), tmp_path)


@pytest.mark.parametrize("variant", ["photometric", "paper-geometric"])
def test_variants_of_the_paper_have_no_term_of_ours(tmp_path: Path, variant: str) -> None:
    model: Any = configure(make_job(tmp_path, variant=variant), tmp_path).pipeline.model
    ours = (model.chroma_weight, model.stereo_depth_weight, model.completed_depth_weight, model.refine_tau)
    assert ours == (0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("entry", "value", "kind"),
    [
        ("scene", 1, "text"),
        ("data", None, "folder"),
        ("views", "3", 'whole number or "all"'),
        ("views", True, "whole number"),
        ("variant", ["full"], "text"),
        ("seed", -1, "0 or more"),
        ("seed", 0.5, "0 or more"),
        ("method", None, "text"),
        ("steps", "2", "whole number or null"),
        ("downscale_factor", 1.5, "whole number or null"),
        ("overrides", ["a=b"], "an object"),
    ],
)
def test_an_entry_of_a_job_list_that_is_of_the_wrong_kind_is_named(
    tmp_path: Path, entry: str, value: Any, kind: str
) -> None:
    (tmp_path / "jobs.json").write_text(json.dumps([make_job(tmp_path).to_dict() | {entry: value}]))
    with pytest.raises(InputError, match=rf"'{entry}' is {re.escape(repr(value))}; expected .*{kind}"):
        read_jobs(tmp_path / "jobs.json")


def test_a_job_list_is_read_as_it_was_written(tmp_path: Path) -> None:
    jobs = [make_job(tmp_path), make_job(tmp_path, views="all", steps=None, seed=1)]
    (tmp_path / "jobs.json").write_text(json.dumps([job.to_dict() for job in jobs]))
    assert read_jobs(tmp_path / "jobs.json") == jobs


@pytest.mark.parametrize(("wrong", "flag"), [({"pictures": -1}, "--pictures"), ({"seeds": (0, -2)}, "--seeds")])
def test_flags_that_would_fail_every_job_are_refused_at_once(tmp_path: Path, wrong: dict[str, Any], flag: str) -> None:
    with pytest.raises(InputError, match=rf"{flag} must be .*, found -"):
        RunConfig(output=tmp_path, **wrong)


def test_a_job_list_excludes_the_flags_that_make_one(tmp_path: Path) -> None:
    config = RunConfig(output=tmp_path, jobs=tmp_path / "jobs.json", steps=5, override=("nonsense",))
    with pytest.raises(InputError, match="--jobs and --steps, --override exclude each other"):
        config._jobs()


@pytest.mark.parametrize("lacks", ["jobs", "hash"])
def test_a_results_folder_whose_list_lacks_something_is_refused(tmp_path: Path, lacks: str) -> None:
    results.merge_entries(tmp_path, [results.Entry(job=make_job(tmp_path), hash="0", folder=tmp_path)])
    path = tmp_path / results.JOBS_FILE
    content = json.loads(path.read_text())
    del (content if lacks == "jobs" else content["jobs"][0])[lacks]
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"is damaged \(KeyError: '{lacks}'\)"):
        results.read_entries(tmp_path)


def test_a_job_is_done_when_its_result_is_whole_and_of_its_hash(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    entry = results.Entry(job=job, hash="h", folder=tmp_path / "job")
    path = entry.folder / results.RESULT_FILE
    assert entry.status() == "missing"
    results.write_json(path, fake_result(job, "h"))
    assert entry.status() == "done"
    path.write_text(path.read_text()[:-20])
    assert entry.status() == "missing"
    worker.write_failure(entry.folder, "no views")
    assert entry.status() == "failed"
    results.write_json(path, fake_result(job, "other"))
    assert entry.status() == "failed"
    assert entry.set_aside()
    assert json.loads((entry.folder / "result.other.json").read_text())["hash"] == "other"
    assert not path.exists()


def test_a_folder_of_another_version_or_of_other_things_is_refused(tmp_path: Path) -> None:
    results.write_json(tmp_path / "old/jobs.json", {"format": "diffusionerf-bench-0", "jobs": []})
    with pytest.raises(InputError, match=r"diffusionerf-bench-0.*reads and writes 'diffusionerf-bench-1'"):
        results.read_entries(tmp_path / "old")
    with pytest.raises(InputError, match="diffusionerf-bench-0"):
        results.merge_entries(tmp_path / "old", [])
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").touch()
    with pytest.raises(InputError, match="other things than results"):
        results.merge_entries(tmp_path / "photos", [])
    with pytest.raises(InputError, match="no results folder"):
        results.read_entries(tmp_path / "photos")
    assert sorted(p.name for p in (tmp_path / "photos").iterdir()) == ["a.jpg"]


def test_two_runs_cannot_write_the_same_folder_and_a_dead_one_leaves_no_lock(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from diffusionerf_ns.bench.results import lock\n"
    code += "with lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=rf"being written by process {holder.pid} on"), results.lock(tmp_path):
        pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with results.lock(tmp_path):
        pass


def test_merging_keeps_jobs_of_earlier_runs_and_renews_those_of_the_same_name(tmp_path: Path) -> None:
    def entry(seed: int, digest: str) -> results.Entry:
        job = make_job(tmp_path, seed=seed)
        return results.Entry(job=job, hash=digest, folder=tmp_path / "out" / job.name)

    results.merge_entries(tmp_path / "out", [entry(0, "a"), entry(1, "a")])
    results.merge_entries(tmp_path / "out", [entry(1, "b"), entry(2, "b")])
    assert [(e.job.seed, e.hash) for e in results.read_entries(tmp_path / "out")] == [(0, "a"), (1, "b"), (2, "b")]
