"""Teacher outputs on disk: found by id in any order, whole or refused, never of another teacher."""

import json
import os
import pathlib
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import jaxcompress as jc
from jaxcompress.distillation import _cache_file, open_cache
from tests.conftest import mesh_of


class Sparse(NamedTuple):
    indices: jax.Array
    logs: jax.Array
    rest: jax.Array


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def some_sparse(count, classes=300, seed=0):
    rng = np.random.default_rng(seed)
    return Sparse(
        jnp.asarray(rng.integers(0, classes, size=(count, 4)), jnp.int32),
        jnp.float32(rng.normal(size=(count, 4))),
        jnp.float32(rng.normal(size=count)),
    )


NUMBERS = [7, -3, 2**62, 0, 12, -(2**63), 5]
NAMES = ["b", "a", "img/ü.png", "aa", "", "z", "图"]


def fill(folder, ids=NUMBERS, teacher="t", **options):
    """A cache of two files, and what each id has in it."""
    cache, logits = open_cache(folder, teacher, **options), draw(len(ids), 5)
    assert cache.write(ids[:3], logits[:3]) == 3
    assert cache.write(ids[3:], jnp.asarray(logits[3:])) == len(ids) - 3
    return cache, dict(zip(ids, logits, strict=True))


def files(folder):
    return sorted(pathlib.Path(folder).iterdir())


class TestLookup:
    @pytest.mark.parametrize("ids", [NUMBERS, NAMES], ids=["numbers", "names"])
    def test_any_order_and_any_shape(self, tmp_path, ids):
        written, known = fill(tmp_path / "c", ids)
        for cache in (written, open_cache(tmp_path / "c", "t")):
            rng = np.random.default_rng(1)
            for shape in [(7,), (20,), (2, 3), (0,), ()]:
                wanted = rng.choice(np.array(ids), size=shape)
                expected = [known[i] for i in np.ravel(wanted).tolist()]
                got = cache.read(wanted)
                assert got.shape == (*shape, 5)
                assert got.dtype == np.float32
                np.testing.assert_array_equal(got, np.reshape(expected, (*shape, 5)))
            np.testing.assert_array_equal(cache.read(ids[::-1]), [known[i] for i in ids[::-1]])
            assert cache.ids() == sorted(ids, key=lambda i: i.encode() if ids is NAMES else i)
            assert type(cache.ids()[0]) in (int, str)

    @settings(derandomize=True, deadline=None, max_examples=25)
    @given(st.lists(st.lists(st.integers(-20, 20), unique=True), max_size=6), st.integers(0, 99))
    def test_it_is_a_dictionary(self, batches, seed):
        import tempfile

        rng, known = np.random.default_rng(seed), {}
        with tempfile.TemporaryDirectory() as folder:
            cache = open_cache(folder, "t")
            for batch in batches:
                rows = rng.normal(size=(len(batch), 2))
                fresh = [i for i in batch if i not in known]
                assert cache.write(np.array(batch, np.int32), rows) == len(fresh)
                known = {**dict(zip(batch, rows, strict=True)), **known}
            if rng.random() < 0.5:
                cache = open_cache(folder, "t")
            assert cache.ids() == sorted(known)
            asked = rng.integers(-25, 25, size=30)
            np.testing.assert_array_equal(cache.has(asked), [i in known for i in asked])
            there = [i for i in asked.tolist() if i in known]
            if there:
                np.testing.assert_array_equal(cache.read(there), [known[i] for i in there])

    def test_a_shuffled_epoch_of_cached_targets_is_one_with_the_teacher(self, tmp_path):
        xs, weights = draw(12, 4), jnp.asarray(draw(4, 3, seed=1))
        ids = np.arange(100, 112)
        cache = open_cache(tmp_path / "c", {"step": 3})
        for part in np.split(np.random.default_rng(0).permutation(12), 3):
            cache.write(ids[part], jnp.asarray(xs[part]) @ weights)
        student = lambda params, batch: batch["x"] @ params  # noqa: E731
        live = jc.distill(student, lambda batch: batch["x"] @ weights)
        read = jc.distill(student, lambda batch: batch["teacher"])
        params = jnp.asarray(draw(4, 3, seed=2))

        def step(opt):
            return jax.jit(lambda b: opt.update(params, opt.init(params), params, batch=b)[0])

        one, other = step(live), step(read)
        for part in np.split(np.random.default_rng(5).permutation(12), 3):
            batch = {"x": xs[part], "teacher": cache.read(ids[part])}
            np.testing.assert_allclose(other(batch), one(batch), rtol=1e-5)

    def test_ids_in_other_containers(self, tmp_path):
        cache = open_cache(tmp_path / "n", "t")
        cache.write(jnp.array([1, 2], jnp.int32), draw(2, 3))
        for same in ([1, 2], (np.int64(1), 2), np.array([1, 2], np.uint64), np.uint8([1, 2])):
            np.testing.assert_array_equal(cache.read(same), draw(2, 3))
        np.testing.assert_array_equal(cache.read(2), draw(2, 3)[1])
        cache = open_cache(tmp_path / "s", "t")
        cache.write(np.array([b"x", "ü".encode()], object), draw(2, 3))
        for same in (["x", "ü"], np.array(["x", "ü"]), np.array(["x", "ü"], object)):
            np.testing.assert_array_equal(cache.read(same), draw(2, 3))
        np.testing.assert_array_equal(cache.read("ü"), draw(2, 3)[1])

    def test_missing_ids_are_named(self, tmp_path):
        cache, _ = fill(tmp_path / "c")
        with pytest.raises(
            ValueError, match=r"cache\.read: `ids` must be in the cache, got 2 of 3.*\[99, 98\]"
        ):
            cache.read([99, 7, 98])
        names, _ = fill(tmp_path / "n", NAMES)
        with pytest.raises(ValueError, match=r"1 of 1 that are not, such as \['cow'\]"):
            names.read(["cow"])
        np.testing.assert_array_equal(cache.has([[99, 7], [0, 98]]), [[False, True], [True, False]])
        with pytest.raises(ValueError, match="be integers, as those that were written, got text"):
            cache.read(["7"])
        with pytest.raises(ValueError, match="be text, as those that were written, got integers"):
            names.has([7])
        empty = open_cache(tmp_path / "none", "t")
        assert not empty.has([1, 2]).any()
        assert empty.ids() == []
        with pytest.raises(ValueError, match="2 of 2 that are not"):
            empty.read([1, 2])
        with pytest.raises(ValueError, match="an empty cache"):
            empty.read([])

    def test_traced_ids(self, tmp_path):
        cache, _ = fill(tmp_path)
        match = r"`ids` must be known.*got traced ones\. Call it outside of jit, where batches"
        for call in (cache.read, cache.has, lambda i: cache.read([7, i[0]])):
            with pytest.raises(TypeError, match=match):
                jax.jit(call)(jnp.array([7, 0]))
        with pytest.raises(TypeError, match=match):
            jax.jit(lambda i: cache.write(i, draw(1, 5)))(jnp.array([1]))

    def test_hundreds_of_files_do_not_stay_open(self, tmp_path):
        cache = open_cache(tmp_path, "t")
        for i in range(150):
            cache.write([i], np.full((1, 2), i, np.float32))
        cache = open_cache(tmp_path, "t")
        wanted = np.random.default_rng(0).permutation(150)
        np.testing.assert_array_equal(cache.read(wanted)[:, 0], wanted)
        if os.path.isdir("/proc/self/fd"):
            links = []
            for name in os.listdir("/proc/self/fd"):
                try:
                    links.append(os.readlink(f"/proc/self/fd/{name}"))
                except OSError:  # that of the listing itself
                    continue
            assert 0 < sum(str(tmp_path) in link for link in links) <= 64


class TestTrees:
    def test_trees_come_back_by_path_or_in_a_structure(self, tmp_path):
        outputs = some_sparse(6)
        cache = open_cache(tmp_path, "t", like=Sparse(0, 0, 0))
        cache.write(range(6), outputs)
        got = cache.read([4, 1])
        assert isinstance(got, Sparse)
        for x, y in zip(got, outputs, strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y[jnp.array([4, 1])])
        plain = open_cache(tmp_path, "t").read([4, 1])
        assert set(plain) == {"indices", "logs", "rest"}
        np.testing.assert_array_equal(plain["logs"], got.logs)
        nested = {"a": [draw(2, 3), None], "b": (draw(2),)}
        cache = open_cache(tmp_path / "n", "t", like={"a": [0, None], "b": (0,)})
        cache.write([1, 2], nested)
        got = cache.read([2, 1])
        np.testing.assert_array_equal(got["a"][0], draw(2, 3)[::-1])
        np.testing.assert_array_equal(got["b"][0], draw(2)[::-1])
        assert set(open_cache(tmp_path / "n", "t").read([1])) == {"a/0", "b/0"}
        with pytest.raises(ValueError, match=r"cache\.read: `like` must have the paths"):
            open_cache(tmp_path, "t", like={"logs": 0}).read([1])

    def test_the_top_k_of_the_library(self, tmp_path):
        logits = jnp.asarray(draw(6, 300))
        top = jc.distillation.top_k(logits, 2.0, k=4)
        like = type(top)(0, 0, 0)
        cache = open_cache(tmp_path, "t", like=like, dtype=jnp.float16, num_classes=300)
        cache.write([10, 11, 12, 13, 14, 15], top)
        (stored,) = files(tmp_path)
        assert load_file(stored)["outputs/indices"].dtype == np.uint16
        got = cache.read([13, 10])
        student = jnp.asarray(draw(2, 300, seed=1))
        rows = jnp.array([3, 0])
        expected = jc.distillation.top_k_loss(student, jax.tree.map(lambda x: x[rows], top), 2.0)
        loss = jax.jit(lambda s, t: jc.distillation.top_k_loss(s, t, 2.0))
        np.testing.assert_allclose(loss(student, got), expected, rtol=1e-2)

    def test_dtypes_are_kept_unless_one_is_asked_for(self, tmp_path):
        for dtype in (
            "float16",
            "bfloat16",
            "float32",
            "float64",
            "int8",
            "uint16",
            "int64",
            "bool",
        ):
            x = (draw(4, 3) * 3).astype(_cache_file.DTYPES[dtype])
            cache = open_cache(tmp_path / dtype, "t")
            cache.write([1, 2, 3, 4], x)
            got = open_cache(tmp_path / dtype, "t").read([4, 2])
            assert got.dtype == x.dtype
            np.testing.assert_array_equal(got, x[[3, 1]])
        for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
            cache = open_cache(tmp_path / f"as {dtype.__name__}", "t", dtype=dtype)
            cache.write([1, 2], draw(2, 3))
            got = cache.read([2, 1])
            assert got.dtype == dtype
            np.testing.assert_array_equal(got, jnp.asarray(draw(2, 3)[::-1]).astype(dtype))
        one = jc.kd_loss(jnp.asarray(draw(2, 3, seed=4)), got)
        assert one.dtype == jnp.float32

    @pytest.mark.parametrize(
        ("classes", "dtype"), [(256, "U8"), (257, "U16"), (65536, "U16"), (65537, "U32")]
    )
    def test_classes_are_packed_and_come_back_as_they_were(self, tmp_path, classes, dtype):
        x = np.array([[0, classes - 1], [1, 2]], np.int32)
        cache = open_cache(tmp_path, "t", num_classes=classes)
        cache.write([1, 2], {"classes": x, "logits": draw(2, 3)})
        got = open_cache(tmp_path, "t").read([2, 1])["classes"]
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, x[::-1])
        (path,) = files(tmp_path)
        head = path.read_bytes()
        header = json.loads(head[8 : 8 + int.from_bytes(head[:8], "little")])
        assert header["outputs/classes"]["dtype"] == dtype
        for wrong in (-1, classes):
            with pytest.raises(ValueError, match=rf"hold classes in \[0, {classes}\), got {wrong}"):
                cache.write([3], {"classes": np.array([[0, wrong]]), "logits": draw(1, 3)})

    def test_float16_is_half_the_file_and_refuses_what_it_cannot_hold(self, tmp_path):
        for dtype in ("float16", "float32"):
            open_cache(tmp_path / dtype, "t", dtype=dtype).write(list(range(50)), draw(50, 100))
        sizes = [files(tmp_path / d)[0].stat().st_size for d in ("float16", "float32")]
        assert abs(sizes[1] - sizes[0] - 50 * 100 * 2) <= 16  # but for padding of the header
        cache = open_cache(tmp_path / "c", "t", dtype=jnp.float16)
        with pytest.raises(
            ValueError,
            match=r"cache\.write: `outputs` must fit float16, up to 65504, got 65520\. Sub",
        ):
            cache.write([1], np.float32([[65520.0, 1.0]]))
        assert not (tmp_path / "c").exists()
        kept = np.float32([[65519.0, -65519.0, np.inf, -np.inf, np.nan, 1e-9]])
        cache.write([1], kept)
        np.testing.assert_array_equal(
            cache.read([1]), np.float16([[65504.0, -65504.0, np.inf, -np.inf, np.nan, 0.0]])
        )

    def test_sequences_empty_axes_and_sharded_arrays(self, tmp_path):
        cache = open_cache(tmp_path / "s", "t")
        cache.write([1, 2], draw(2, 4, 5))
        np.testing.assert_array_equal(cache.read([[2], [1]]), draw(2, 4, 5)[::-1][:, None])
        cache = open_cache(tmp_path / "e", "t")
        cache.write([1, 2], {"none": np.zeros((2, 0, 3)), "one": draw(2)})
        assert cache.read([1])["none"].shape == (1, 0, 3)
        mesh = mesh_of("auto")
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
        cache = open_cache(tmp_path / "m", "t")
        cache.write(np.arange(8), jax.device_put(draw(8, 3), place))
        np.testing.assert_array_equal(cache.read([5]), draw(8, 3)[5:6])


class TestWriting:
    def test_a_run_that_was_stopped_goes_on(self, tmp_path):
        logits, ids = draw(10, 3), np.arange(10)
        open_cache(tmp_path, "t").write(ids[:4], logits[:4])
        cache = open_cache(tmp_path, "t")
        todo = ids[~cache.has(ids)]
        np.testing.assert_array_equal(todo, ids[4:])
        # Whole batches may be written anyway: what is there stays as it is.
        assert cache.write(ids[2:7], logits[2:7] + 100) == 3
        assert cache.write(ids[2:7], logits[2:7] + 100) == 0
        assert cache.write([], np.zeros((0, 3), np.float32)) == 0
        assert len(files(tmp_path)) == 2
        expected = np.where(ids[:7, None] < 4, logits[:7], logits[:7] + 100)
        np.testing.assert_array_equal(cache.read(ids[:7]), expected)
        np.testing.assert_array_equal(open_cache(tmp_path, "t").read(ids[:7]), expected)

    def test_two_processes_may_write_to_one_folder(self, tmp_path):
        one, other = open_cache(tmp_path, "t"), open_cache(tmp_path, "t")
        assert one.write([1, 2], draw(2, 3)) == 2
        # What the one wrote is known at the next write of the other.
        assert not other.has([1, 2]).any()
        assert other.write([4, 3, 2], draw(3, 3) + 1) == 2
        assert other.ids() == [1, 2, 3, 4]
        assert not one.has([3])[0]
        assert one.write([3], draw(1, 3)) == 0
        expected = [*draw(2, 3), draw(3, 3)[1] + 1, draw(3, 3)[0] + 1]
        for cache in (one, other, open_cache(tmp_path, "t")):
            np.testing.assert_array_equal(cache.read([1, 2, 3, 4]), expected)

    def test_two_that_write_at_once_may_have_an_id_twice(self, tmp_path, monkeypatch):
        one, other = open_cache(tmp_path, "t"), open_cache(tmp_path, "t")
        one.write([1, 2], draw(2, 3))
        with monkeypatch.context() as patch:
            patch.setattr(os, "listdir", lambda folder: [])
            assert other.write([3, 2], draw(2, 3) + 1) == 2
        assert other.write([4], draw(1, 3)) == 1
        # Each goes on with its own.
        assert other.ids() == [1, 2, 3, 4]
        np.testing.assert_array_equal(other.read([2, 1]), [draw(2, 3)[1] + 1, draw(2, 3)[0]])
        both = open_cache(tmp_path, "t")
        assert both.ids() == [1, 2, 3, 4]
        np.testing.assert_array_equal(both.read([1, 3]), [draw(2, 3)[0], draw(2, 3)[0] + 1])
        assert both.read([2])[0].tolist() in (draw(2, 3)[1].tolist(), (draw(2, 3)[1] + 1).tolist())

    def test_what_others_wrote_is_of_the_same_cache(self, tmp_path):
        for case, (teacher, ids, rows, options, match) in enumerate(
            [
                ("u", [3], draw(1, 3), {}, "`folder` must be of the teacher .*another teacher"),
                ("t", [3], draw(1, 4), {}, r"`outputs` must be float32 as float32\[3\]"),
                (
                    "t",
                    [3],
                    draw(1, 3),
                    {"dtype": "float16"},
                    r"`outputs` must be float32 as float32",
                ),
                ("t", ["a"], draw(1, 3), {}, "`ids` must be integers"),
            ]
        ):
            folder = tmp_path / str(case)
            late = open_cache(folder, teacher, **options)
            open_cache(folder, "t").write([1, 2], draw(2, 3))
            for _ in range(2):
                with pytest.raises(ValueError, match=rf"cache\.write: {match}"):
                    late.write(ids, rows)
            assert len(files(folder)) == 1
            np.testing.assert_array_equal(open_cache(folder, "t").read([1, 2]), draw(2, 3))

    def test_another_teacher_is_refused(self, tmp_path):
        fill(tmp_path, teacher={"step": 3, "name": "big"})
        assert open_cache(tmp_path, {"name": "big", "step": 3}).ids()
        for other in ({"name": "big", "step": 4}, "big"):
            with pytest.raises(
                ValueError,
                match=r'folder` must be of .*another teacher, \{"name": "big", "step": 3\} at',
            ):
                open_cache(tmp_path, other)
        for wrong in (None, "", {}, 3, {"x": np.ones(2)}, {"x": float("nan")}):
            with pytest.raises(TypeError, match="open_cache: `teacher` must be text, or a dict"):
                open_cache(tmp_path, wrong)

    def test_files_of_another_cache_do_not_mix_in(self, tmp_path):
        fill(tmp_path / "a")
        open_cache(tmp_path / "b", "t").write([50], draw(1, 6))
        os.rename(files(tmp_path / "b")[0], tmp_path / "a" / "zz.safetensors")
        with pytest.raises(
            ValueError, match=r"open_cache: `outputs` must be .*float32\[5\].*\[6\]"
        ):
            open_cache(tmp_path / "a", "t")

    def test_all_batches_are_alike(self, tmp_path):
        cache, _ = fill(tmp_path)
        rule = r"cache\.write: `outputs` must be float32 as float32\[5\] for each example"
        for wrong in (draw(1, 4), draw(1, 5).astype(np.float64), {"a": draw(1, 5)}):
            with pytest.raises(ValueError, match=rule):
                cache.write([50], wrong)
        with pytest.raises(ValueError, match=rule):
            open_cache(tmp_path, "t", dtype=jnp.float16).write([50], draw(1, 5))
        with pytest.raises(ValueError, match=r"cache\.write: `ids` must be integers"):
            cache.write(["50"], draw(1, 5))
        assert len(files(tmp_path)) == 2

    def test_batches_that_contradict_themselves(self, tmp_path):
        cache = open_cache(tmp_path / "c", "t")
        with pytest.raises(ValueError, match=r"cache\.write: `ids` must differ .*\[3, 7\] twice"):
            cache.write([7, 3, 1, 3, 7], draw(5, 2))
        with pytest.raises(
            ValueError, match=r"have a row for each of the 2 ids, got float32\[3, 2\]"
        ):
            cache.write([1, 2], draw(3, 2))
        with pytest.raises(ValueError, match=r"row for each of the 2 ids, got float32\[\] at 'b'"):
            cache.write([1, 2], {"a": draw(2), "b": np.float32(1.0)})
        with pytest.raises(ValueError, match=r"`ids` must have one axis, of the rows"):
            cache.write([[1], [2]], draw(2, 2))
        with pytest.raises(ValueError, match="hold arrays, got a tree without leaves"):
            cache.write([1], None)
        for wrong in (draw(1, 2) * 1j, np.array([["x"]]), [3.0], jax.random.key(0)[None]):
            with pytest.raises(TypeError, match="hold arrays of booleans or real numbers"):
                cache.write([1], wrong)
        with pytest.raises(TypeError, match=r"hold arrays .* Call it outside of jit"):
            jax.jit(lambda x: cache.write([1], x))(jnp.ones((1, 2)))
        for wrong, fix in [
            ([[1.0, 2.0]], "got float 1.0 at '0/0'. Pass an array: a list is a tree"),
            (draw(1, 2) * 1j, "Write its real and its imaginary part"),
            (np.array([["x"]]), r"got str32\[1, 1\]\.$"),
        ]:
            with pytest.raises(TypeError, match=fix):
                cache.write([1], wrong)
        rule = r"cache\.write: `ids` must be signed integers of 64 bits or text"
        for wrong in ([1.0], [True], np.array([2**63], np.uint64), [2**63], ["a", 1], [None]):
            with pytest.raises(TypeError, match=rule):
                cache.write(wrong, draw(1, 2))
        with pytest.raises(TypeError, match=rule):
            cache.write(["a\0"], draw(1, 2))
        with pytest.raises(TypeError, match="`ids` must be valid Unicode"):
            cache.write(["\ud800"], draw(1, 2))
        with pytest.raises(TypeError, match=r"signed .* got uint64\[1\] with 9223372036854775808"):
            cache.write(np.array([2**63], np.uint64), draw(1, 2))
        assert not (tmp_path / "c").exists()

    def test_options_and_folders(self, tmp_path, monkeypatch):
        with pytest.raises(TypeError, match="open_cache: `dtype` must be one of float16"):
            open_cache(tmp_path, "t", dtype=jnp.int8)
        with pytest.raises(TypeError, match="open_cache: `dtype` must be one of float16"):
            open_cache(tmp_path, "t", dtype="half of it")
        with pytest.raises(ValueError, match="open_cache: `num_classes` must be"):
            open_cache(tmp_path, "t", num_classes=0)
        with pytest.raises(
            FileNotFoundError, match=r"cache\.write: `folder` must be in a directory"
        ):
            open_cache(tmp_path / "no" / "c", "t").write([1], draw(1, 2))
        (tmp_path / "file").write_text("x")
        with pytest.raises(NotADirectoryError, match="open_cache: `folder` must name a folder"):
            open_cache(tmp_path / "file", "t")
        cache, known = fill(tmp_path / "c")
        monkeypatch.setitem(sys.modules, "safetensors", None)
        # What is there can be read without the package.
        np.testing.assert_array_equal(open_cache(tmp_path / "c", "t").read([7])[0], known[7])
        with pytest.raises(ImportError, match="pip install"):
            cache.write([50], draw(1, 5))

    def test_other_files_in_the_folder_are_left_alone(self, tmp_path):
        cache, known = fill(tmp_path)
        (tmp_path / "notes.txt").write_text("mine")
        (tmp_path / "abc.safetensors.part").write_bytes(b"cut")
        np.testing.assert_array_equal(open_cache(tmp_path, "t").read([7])[0], known[7])
        assert cache.write([50], draw(1, 5)) == 1

    @pytest.mark.parametrize("call", ["replace", "fsync"])
    def test_a_crash_leaves_no_part(self, tmp_path, monkeypatch, call):
        cache, known = fill(tmp_path)
        before = files(tmp_path)

        def crash(*args):
            raise OSError("no space left")

        monkeypatch.setattr(os, call, crash)
        with pytest.raises(OSError, match="no space left"):
            cache.write([50], draw(1, 5))
        monkeypatch.undo()
        assert files(tmp_path) == before
        for again in (cache, open_cache(tmp_path, "t")):
            assert not again.has([50])[0]
            np.testing.assert_array_equal(again.read([7])[0], known[7])
        assert cache.write([50], draw(1, 5)) == 1
        np.testing.assert_array_equal(cache.read([50]), draw(1, 5))


class TestDamage:
    def test_any_reader_of_the_format_lists_the_arrays(self, tmp_path):
        cache = open_cache(tmp_path, "t")
        cache.write([3, 1], {"logits": draw(2, 5)})
        tensors = load_file(files(tmp_path)[0])
        assert set(tensors) == {"ids", "checks", "outputs/logits"}
        np.testing.assert_array_equal(tensors["ids"], [3, 1])
        np.testing.assert_array_equal(tensors["outputs/logits"], draw(2, 5))

    @pytest.mark.parametrize("ids", [[3, 1, 2], ["a", "b", "cc"]], ids=["numbers", "names"])
    def test_every_truncation_is_refused(self, tmp_path, ids):
        open_cache(tmp_path, "t").write(ids, {"a": draw(3, 2), "b": draw(3, 3)})
        (path,) = files(tmp_path)
        data = path.read_bytes()
        for cut in {*range(20), *range(0, len(data), 23), *range(len(data) - 20, len(data))}:
            path.write_bytes(data[:cut])
            with pytest.raises(
                ValueError, match=r"open_cache: `folder` must hold only whole files .* at '.*Delete"
            ):
                open_cache(tmp_path, "t")
        path.write_bytes(data + b"\0")
        with pytest.raises(ValueError, match="damaged"):
            open_cache(tmp_path, "t")

    @pytest.mark.parametrize("ids", [[3, 1, 2], ["a", "b", "cc"]], ids=["numbers", "names"])
    def test_every_flipped_byte_is_refused_or_harmless(self, tmp_path, ids):
        open_cache(tmp_path, "t").write(ids, {"a": draw(3, 2), "b": draw(3, 3)})
        (path,) = files(tmp_path)
        data = path.read_bytes()
        refused = 0
        for place in range(len(data)):
            for flip in (0xFF, 0x01, 0x20):
                changed = bytearray(data)
                changed[place] ^= flip
                path.write_bytes(changed)
                try:
                    got = open_cache(tmp_path, "t").read(ids)
                except ValueError:
                    refused += 1
                else:
                    np.testing.assert_array_equal(got["a"], draw(3, 2))
                    np.testing.assert_array_equal(got["b"], draw(3, 3))
        # Only padding of the header, at most a word, may change without harm.
        assert refused >= len(data) * 3 - 8 * 3

    def test_only_the_rows_asked_for_are_read(self, tmp_path):
        cache = open_cache(tmp_path, "t")
        cache.write(np.arange(6), draw(6, 4))
        (path,) = files(tmp_path)
        data = bytearray(path.read_bytes())
        place = bytes(data).index(draw(6, 4)[2].tobytes())
        data[place] ^= 1
        path.write_bytes(data)
        # A damaged row that is not read is not noticed: the others are not held up by it.
        cache = open_cache(tmp_path, "t")
        np.testing.assert_array_equal(cache.read([5, 1]), draw(6, 4)[[5, 1]])
        with pytest.raises(
            ValueError, match=r"damaged row, that of the id 2 at .*Delete this file"
        ):
            cache.read([5, 2])
        (rows,) = _cache_file.arrays(_cache_file.read("open_cache", str(path)))
        base = rows
        while getattr(base, "base", None) is not None and not isinstance(base, np.memmap):
            base = base.base
        assert isinstance(base, np.memmap)

    @pytest.mark.parametrize(
        "data", [b"", b"PK\x03\x04" * 9, b"\x80\x04" * 50, b"\xff" * 64, bytes(64)]
    )
    def test_files_of_another_format(self, tmp_path, data):
        (tmp_path / "x.safetensors").write_bytes(data)
        with pytest.raises(ValueError, match=r"hold only whole files of a cache.*x\.safetensors"):
            open_cache(tmp_path, "t")

    @pytest.mark.parametrize(
        "header", [b"[1, 2]", b'{"__metadata__":3}', b"[" * 5000, b"12", b"{}"]
    )
    def test_odd_headers(self, tmp_path, header):
        (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(ValueError, match="hold only whole files of a cache"):
            open_cache(tmp_path, "t")

    def test_files_of_another_program_and_of_a_later_release(self, tmp_path, monkeypatch):
        save_file({"w": draw(2)}, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match="another program"):
            open_cache(tmp_path, "t")
        os.remove(tmp_path / "x.safetensors")
        monkeypatch.setattr(_cache_file, "VERSION", 2)
        open_cache(tmp_path, "t").write([1], draw(1, 2))
        monkeypatch.undo()
        with pytest.raises(ValueError, match="format version 2; this release reads 1"):
            open_cache(tmp_path, "t")

    def test_a_file_that_is_cut_while_it_is_open(self, tmp_path):
        cache, _ = fill(tmp_path)
        for path in files(tmp_path):
            path.write_bytes(path.read_bytes()[:-4])
        with pytest.raises(ValueError, match="changed its size"):
            cache.read([7])


def test_training_from_float16_targets_in_a_scan(tmp_path):
    xs, teacher = draw(8, 4), draw(4, 3, seed=1)
    cache = open_cache(tmp_path, "t", dtype=jnp.float16)
    cache.write(np.arange(8), xs @ teacher)
    order = np.random.default_rng(0).permutation(8).reshape(4, 2)
    batches = {"x": jnp.asarray(xs[order]), "teacher": jnp.asarray(cache.read(order))}
    student = lambda params, batch: batch["x"] @ params  # noqa: E731
    opt = optax.chain(jc.distill(student, lambda batch: batch["teacher"]), optax.sgd(0.5))

    def step(carry, batch):
        params, state = carry
        updates, state = opt.update(jnp.zeros_like(params), state, params, batch=batch)
        return (optax.apply_updates(params, updates), state), None

    params = jnp.zeros((4, 3))

    def epoch(carry, _):
        return jax.lax.scan(step, carry, batches)

    (params, _), _ = jax.lax.scan(epoch, (params, opt.init(params)), length=50)
    loss = lambda w: jnp.mean(jc.kd_loss(xs @ w, jnp.asarray(xs @ teacher)))  # noqa: E731
    assert loss(params) < loss(jnp.zeros((4, 3))) / 20
