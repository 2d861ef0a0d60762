import collections
import gc
import json
import logging
import os
import pwd
import resource
import shutil
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxtrain.checkpoint import integrity, storage
from jaxtrain.checkpoint.checkpointer import CheckpointConfig
from jaxtrain.checkpoint.restore import load_data, restore_params, step_folder
from jaxtrain.distributed import consensus
from jaxtrain.errors import UserError

Moments = collections.namedtuple("Moments", "mu nu count")


@pytest.fixture
def make(tmp_path):
    """Makes checkpointers on one folder and closes them."""
    made = []

    def build(**config):
        made.append(CheckpointConfig(**config).build(tmp_path / "checkpoints"))
        return made[-1]

    yield build
    for checkpointer in made:
        checkpointer.close()


def mesh_of(*sizes):
    devices = np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes)
    return jax.sharding.Mesh(devices, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def state_on(mesh, seed=0):
    """A train state with all dtypes, a function of the seed alone."""
    rng = np.random.default_rng(seed)

    def put(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    w = rng.normal(size=(16, 8)).astype(np.float32)
    params = {"layers": {"w": put(w, "fsdp", "tensor")}, "norm": put(w[0].astype(jnp.bfloat16))}
    moments = Moments(mu={"w": put(w * 2, "fsdp")}, nu=(put(w[:, 0], "fsdp"),), count=put(np.int32(seed)))
    fingerprint = put(rng.integers(0, 2**32, 2, np.uint32))
    return {"params": params, "opt": {"adam": moments, "empty": ()}, "meta": {"fingerprint": fingerprint}}


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save_all(checkpointer, steps, mesh=None, **kwargs):
    for step in steps:
        checkpointer.save(step, state_on(mesh or mesh_of(1, 1), step), {"tokens": step}, **kwargs)
        checkpointer.wait()


DATA = {"lanes": [[0, 1, 2**40, 3], "x"], "tokens": 2**70, "config": {"none": None, "name": "straße"}}


@pytest.mark.parametrize("sizes", [(1, 1), (8, 1), (2, 4), (4, 1)])
def test_round_trip_onto_other_meshes(make, sizes):
    saved = state_on(mesh_of(4, 2))
    first = make()
    first.save(7, saved, DATA)
    first.close()
    second = make()
    assert second.latest_step() == 7
    assert second.restore_data(7) == DATA
    expected = state_on(mesh_of(*sizes))
    assert_same(second.restore(7, abstract(expected)), expected)


def test_saved_arrays_may_be_donated_and_data_may_change(make):
    checkpointer = make()
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = step(jnp.zeros(1 << 22))
    data = {"lanes": [1]}
    checkpointer.save(1, {"params": {"x": x}}, data)
    data["lanes"].append(2)
    for _ in range(5):
        x = step(x)
    x.block_until_ready()
    checkpointer.wait()
    shape = {"params": {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)}}
    assert set(np.unique(checkpointer.restore(1, shape)["params"]["x"])) == {1.0}
    assert checkpointer.restore_data(1) == {"lanes": [1]}


def test_data_that_is_not_json_is_refused_at_once(make):
    with pytest.raises(TypeError):
        make().save(1, state_on(mesh_of(1, 1)), {"n": np.int64(1)})


def test_saving_a_saved_step_again_changes_nothing(make):
    checkpointer = make()
    save_all(checkpointer, [3, 3])
    assert checkpointer.latest_step() == 3


def test_params_alone_from_any_path(make, tmp_path):
    save_all(make(), [1, 2])
    wanted = state_on(mesh_of(2, 1), 2)["params"]
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints/2", str(tmp_path)):
        assert_same(restore_params(path, abstract(wanted)), wanted)
        assert load_data(path) == {"tokens": 2}
    assert_same(restore_params(tmp_path, abstract(wanted), step=1), state_on(mesh_of(2, 1), 1)["params"])
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding), wanted)
    assert_same(restore_params(tmp_path, half), jax.tree.map(lambda x: x.astype(jnp.bfloat16), wanted))


def test_paths_without_a_checkpoint(make, tmp_path):
    make()
    with pytest.raises(UserError, match="holds no checkpoint: give"):
        step_folder(tmp_path)
    save_all(make(), [4])
    with pytest.raises(UserError, match="no checkpoint of step 5; it has 4"):
        step_folder(tmp_path, 5)


def test_other_shapes_are_named(make):
    checkpointer = make()
    save_all(checkpointer, [1])
    wanted = abstract(state_on(mesh_of(1, 1)))
    wanted["params"]["layers"] = {"v": jax.ShapeDtypeStruct((3,), jnp.float32)}
    with pytest.raises(UserError) as error:
        checkpointer.restore(1, wanted)
    assert "layers/v: saved nothing, expected (3,)" in str(error.value)
    assert "layers/w: saved (16, 8), expected nothing" in str(error.value)


# Which checkpoints are kept.


@pytest.mark.parametrize(
    ("config", "kept"),
    [({"keep": 1}, [6]), ({"keep": 3}, [4, 5, 6]), ({"keep": 1, "keep_every": 2}, [2, 4, 6])],
)
def test_retention(make, tmp_path, config, kept):
    save_all(make(**config), range(1, 7))
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == kept


def test_the_best_are_kept_over_restarts(make, tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: float("nan"), 4: None, 5: 2.0, 6: 9.0, 7: 8.0}
    for step, loss in losses.items():
        checkpointer = make(keep=1, keep_best=2)
        save_all(checkpointer, [step], metrics=None if loss is None else {"eval_loss": loss})
        checkpointer.close()
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [2, 5, 7]


def test_due_by_steps(make):
    checkpointer = make(every_steps=4)
    assert [step for step in range(1, 13) if checkpointer.should_save(step)] == [4, 8, 12]


def test_due_by_minutes(make, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(consensus.time, "monotonic", lambda: clock[0])
    checkpointer = make(every_steps=1000, every_minutes=1.0)
    due = []
    for step in range(1, 200):
        clock[0] += 1.0
        if checkpointer.should_save(step):
            due.append(step)
            checkpointer.save(step, {"params": {"w": jnp.zeros(1)}}, {})
    assert due == [60, 120, 180]


def test_minutes_with_several_processes_take_few_looks(monkeypatch):
    clock, looks = [0.0], []
    monkeypatch.setattr(consensus.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(consensus.jax, "process_count", lambda: 2)
    monkeypatch.setattr(consensus, "broadcast", lambda values: looks.append(clock[0]) or np.array(values))
    timer = consensus.Timer(10.0)
    due = []
    for step in range(1, 2000):
        clock[0] += 1.0
        if timer.is_due():
            due.append(step)
            timer.restart()
    assert due == [600, 1200, 1800]
    assert len(looks) < 2000 / 20


@pytest.mark.parametrize(
    "wrong", [{"every_steps": 0}, {"every_minutes": 0.0}, {"keep": 0}, {"keep_every": 0}, {"keep_best": -1}]
)
def test_config_is_checked(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        CheckpointConfig(**wrong).check()
    CheckpointConfig().check()


# Damage.


def damage(path, how):
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(bytes(content))


def files_of(folder):
    unlisted = ("commit_success.txt", "_CHECKPOINT_METADATA")  # Orbax writes them after the list
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in unlisted)


def test_any_damage_to_any_file_is_found(make, tmp_path):
    save_all(make(), [1])
    folder = tmp_path / "checkpoints/1"
    assert integrity.problem(epath.Path(folder)) is None
    for path in files_of(folder):
        whole = path.read_bytes()
        for how in ("missing", "cut", "changed"):
            damage(path, how)
            found = integrity.problem(epath.Path(folder))
            assert found is not None, (path, how)
            assert path.name in found
            path.write_bytes(whole)


@pytest.mark.parametrize("how", ["missing", "cut", "changed"])
def test_a_damaged_newest_checkpoint_is_moved_aside(make, tmp_path, how, caplog):
    folder = tmp_path / "checkpoints"
    first = make(keep=3)
    save_all(first, [1, 2, 3])
    first.close()
    for step in (2, 3):
        damage(max(files_of(folder / str(step) / "params"), key=lambda p: p.stat().st_size), how)
    second = make(keep=3)
    assert second.latest_step() == 1
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2.corrupt", "3.corrupt"]
    assert "3 is damaged and was moved to" in caplog.text
    expected = state_on(mesh_of(1, 1), 1)
    assert_same(second.restore(1, abstract(expected)), expected)
    # The same steps are saved again and may be damaged again.
    save_all(second, [2, 3])
    second.close()
    damage(folder / "3/data/metadata", how)
    assert make(keep=3).latest_step() == 2
    assert (folder / "3.corrupt-2").exists()


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_afresh(make, tmp_path):
    first = make()
    save_all(first, [1])
    first.close()
    (tmp_path / "checkpoints/1/data/metadata").unlink()
    with pytest.raises(UserError, match=r"No checkpoint in .* is intact"):
        make()
    assert (tmp_path / "checkpoints/1").exists()


def test_damage_found_while_reading(make, tmp_path):
    save_all(make(), [1])
    (tmp_path / "checkpoints/1/params/manifest.ocdbt").unlink()
    with pytest.raises(UserError, match=r"is damaged: .*manifest\.ocdbt is missing"):
        restore_params(tmp_path, abstract(state_on(mesh_of(1, 1))["params"]))
    (tmp_path / "checkpoints/1/data/metadata").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        load_data(tmp_path)


def nameless(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")


def large_state():
    """Arrays whose file is above the megabyte up to which version 0.1 kept checksums."""
    return {"params": {"w": jax.random.normal(jax.random.key(0), (1 << 19,))}}


def flip_a_bit_of_the_largest_file(folder):
    path = max(files_of(folder), key=lambda p: p.stat().st_size)
    assert path.stat().st_size > 1 << 20
    damage(path, "changed")
    return path


def test_a_flipped_bit_of_a_large_array_is_found_and_an_older_checkpoint_is_used(make, tmp_path, caplog):
    state = large_state()
    first = make()
    for step in (1, 2):
        first.save(step, state, {"tokens": step})
    first.close()
    path = flip_a_bit_of_the_largest_file(tmp_path / "checkpoints/2")
    with pytest.raises(UserError, match=r"Checkpoint .*2 is damaged: .* does not match its checksum"):
        restore_params(tmp_path, abstract(state["params"]))
    caplog.set_level(logging.INFO)
    second = make()
    assert f"Checkpoint 2 is damaged: {path} does not match its checksum." in caplog.text
    assert "2.corrupt; using checkpoint 1" in caplog.text
    assert "Verified the files of checkpoint 1" in caplog.text
    assert second.latest_step() == 1
    assert_same(second.restore(1, abstract(state)), state)


def test_lists_of_version_0_1_compare_the_sizes_of_large_files(make, tmp_path, monkeypatch):
    monkeypatch.setattr(pwd, "getpwuid", nameless)
    first = make()
    first.save(1, large_state(), {"tokens": 1})
    first.close()
    files = tmp_path / "checkpoints/1/files.json"
    listed = {
        name: [size, crc if size <= 1 << 20 else -1] for name, (size, crc) in json.loads(files.read_text()).items()
    }
    files.write_text(json.dumps(listed))
    path = flip_a_bit_of_the_largest_file(tmp_path / "checkpoints/1")
    second = make()
    assert second.latest_step() == 1
    second.close()
    damage(path, "cut")
    with pytest.raises(UserError, match=r"No checkpoint in .* is intact"):
        make()


def test_processes_share_listing_and_verifying(tmp_path):
    folder = epath.Path(tmp_path)
    for process in range(3):
        for item in ("params", "opt"):
            path = folder / f"{item}.orbax-checkpoint-tmp" / f"ocdbt.process_{process}" / "d" / "array"
            path.parent.mkdir(parents=True)
            path.write_bytes(bytes([process]) * 100)
    for process in range(3):
        integrity.write_share(folder, process)
    for item in ("params", "opt"):
        (folder / f"{item}.orbax-checkpoint-tmp").rename(folder / item)
    (folder / "params" / "manifest.ocdbt").write_bytes(b"x")
    integrity.write(folder, 3, skip="_CHECKPOINT_METADATA")
    listed = json.loads((folder / "files.json").read_text())
    assert len(listed) == 7
    assert [p.name for p in folder.iterdir() if p.is_file()] == ["files.json"]
    assert [integrity.problem(folder, process, 3) for process in range(3)] == [None] * 3
    damage(tmp_path / "opt/ocdbt.process_2/d/array", "changed")
    found = [integrity.problem(folder, process, 3) for process in range(3)]
    assert sum(problem is not None and "does not match its checksum" in problem for problem in found) == 1


# Places.


@pytest.mark.parametrize("name", ["a[x]", "a[12]", "back\\slash", "wh?t", "st*r", "latin-1 \udce9"])
def test_paths_that_orbax_and_tensorstore_misread(tmp_path, name):
    (tmp_path / "star/checkpoints").mkdir(parents=True)  # what "st*r" matches
    state = state_on(mesh_of(1, 1))
    for step in (1, 2):
        checkpointer = CheckpointConfig(keep=1).build(tmp_path / name / "checkpoints")
        assert (checkpointer.latest_step() or 0) == step - 1
        checkpointer.save(step, state, {"tokens": step})
        checkpointer.close()
    assert_same(restore_params(tmp_path / name, abstract(state["params"])), state["params"])
    assert load_data(tmp_path / name / "checkpoints/2") == {"tokens": 2}
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted({name, "star"})
    assert [p.name for p in (tmp_path / name / "checkpoints").iterdir()] == ["2"]


def test_a_checkpoint_without_arrays_is_not_committed(make, tmp_path, monkeypatch):
    """Orbax only warns if it finds nothing to merge."""

    async def skip_merge(*args, **kwargs):
        pass

    monkeypatch.setattr("orbax.checkpoint._src.serialization.ocdbt_utils.merge_ocdbt_per_process_files", skip_merge)
    checkpointer = make()
    checkpointer.save(1, state_on(mesh_of(1, 1)), {})
    with pytest.raises(RuntimeError, match="Orbax wrote no arrays to"):
        checkpointer.wait()
    assert not list((tmp_path / "checkpoints").iterdir())


def test_users_without_a_name(make, monkeypatch):
    monkeypatch.setattr(pwd, "getpwuid", nameless)
    save_all(make(), [1, 2, 3])
    checkpointer = make()
    assert checkpointer.latest_step() == 3
    state = state_on(mesh_of(1, 1), 3)
    assert_same(checkpointer.restore(3, abstract(state)), state)


# Storage that refuses.


@pytest.mark.parametrize("left", ["a file", "nothing"])
def test_a_removed_folder_is_one_message(make, tmp_path, left, capfd):
    checkpointer = make()
    save_all(checkpointer, [1])
    shutil.rmtree(tmp_path / "checkpoints")
    if left == "a file":
        (tmp_path / "checkpoints").touch()
    with pytest.raises(UserError, match=r"Checkpoint 2 could not be written.*(no longer a directory|was removed)"):
        save_all(checkpointer, [2])
    assert "Traceback" not in capfd.readouterr().err


def test_what_a_store_refuses_in_words():
    for text, words in {
        "[Errno 1] Operation not permitted: 'x'": "not allowed",
        "[Errno 20] Not a directory: 'x'": "no longer a directory",
        "[Errno 2] No such file or directory: 'x'": "removed",
        "RESOURCE_EXHAUSTED: No space left on device": "full",
    }.items():
        assert words in (storage.refusal(ValueError(text)) or "")
    assert storage.refusal(ValueError("shapes differ")) is None


@pytest.fixture(params=["limit", "tmpfs"])
def full_disk(request, tmp_path):
    """(folder, function that fills its disk): a file size limit, or a real small disk if mounting is allowed."""
    if request.param == "limit":
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        yield tmp_path, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        return
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    yield tmp_path, lambda: None
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_full_disk_is_explained_and_loses_nothing(full_disk, capfd):
    folder, fill = full_disk
    # 4 MB, 3.7 compressed; several arrays, so that some are still being written when the first fails.
    state = {"params": {f"w{i}": jax.random.normal(jax.random.key(i), (1 << 17,)) for i in range(8)}}
    checkpointer = CheckpointConfig(keep=5).build(folder / "checkpoints")
    checkpointer.save(1, state, {"tokens": 1})
    checkpointer.wait()
    fill()
    checkpointer.save(2, state, {"tokens": 2})
    with pytest.raises(UserError) as error:
        checkpointer.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert "Checkpoint 2 could not be written" in str(error.value)
    assert "disk is full" in str(error.value)
    assert "checkpoint 1 is intact" in str(error.value)
    checkpointer.close()
    assert "Traceback" not in capfd.readouterr().err
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["1"]
    again = CheckpointConfig(keep=5).build(folder / "checkpoints")
    assert again.latest_step() == 1
    assert_same(again.restore(1, abstract(state)), state)
    again.close()
    gc.collect()  # writes that were abandoned end here and not in another test


def test_a_failed_save_shows_at_the_next_step(make, monkeypatch):
    checkpointer = make()

    def fail(folder, num_processes, skip):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(integrity, "write", fail)
    checkpointer.save(1, state_on(mesh_of(1, 1)), {})
    while checkpointer._background.error is None:
        time.sleep(0.05)
    with pytest.raises(UserError, match="writing is not allowed there; no earlier one exists"):
        checkpointer.should_save(2)
