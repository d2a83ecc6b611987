"""Whole residual blocks: finding them, leaving them out, and gates on them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check, _sharding, tree
from jaxcompress._types import PyTree
from jaxcompress.tracing._dropped import execute, plan, rows_of
from jaxcompress.tracing._jaxprs import is_array, trace
from jaxcompress.tracing._residual_blocks import Blocks, ResidualBlock, blocks_of, layers_of
from jaxcompress.tracing._residuals import alive
from jaxcompress.tracing._sites import require_function


class Dropped(NamedTuple):
    """A block to leave out. Static.

    Attributes:
        block: of `jc.pruning.residual_blocks`.
        stays: of a scan over layers, for each layer whether it stays; else empty.
    """

    block: ResidualBlock
    stays: tuple[bool, ...] = ()


def residual_blocks(
    fn: Callable[..., PyTree],
    params: PyTree,
    *args: Any,
    whole_layers: bool = False,
    **kwargs: Any,
) -> tuple[ResidualBlock, ...]:
    """The parts of a function that can be left out whole: every `f` in `y = x + f(x)`.

    A block is a sum one side of which is `x` as it is (it may be cast, constrained to a sharding
    or checkpointed on the way) and the other side is computed from `x` with parameters. Blocks
    side by side, as `x + attention(x) + mlp(x)`, are one each, and a bias that is added after
    the sum goes with its block. Left out, `y = x`: what comes after, as the norm of a post-norm
    transformer or the activation of a ResNet, stays. They are found in `jit`, `checkpoint`,
    `cond`, `shard_map`, custom derivatives and loops.

    No blocks are sums whose other side is not computed from `x` (biases, embeddings of positions,
    masks, gates of recurrent networks), a skip that is changed on the way (a scaled one, the
    convolution of a downsampling ResNet block), concatenations, and `x - f(x)`.

    A `scan` over layers is one block with `layers`, each of which can be left out alone, if all
    that it carries passes through blocks, norms and activations or is summed up, and if what it
    stacks is not used. The blocks inside are not listed then. Where the layer is counted in the
    carry or a key is split there, and in loops over anything else, the blocks of the body are
    listed: left out, they are left out of all trips.

    Args:
        fn: any function `fn(params, *args, **kwargs)`. It is traced, not run.
        params: any pytree. Arrays, or `jax.ShapeDtypeStruct`s.
        *args: further arguments; arrays, `jax.ShapeDtypeStruct`s, or static values.
        whole_layers: static. Blocks that follow each other and whose leaves have a numbered
            path in common (`layers/3/attn`, `layers/3/mlp`) become one.
        **kwargs: as `args`.

    Returns:
        `ResidualBlock`s in the order of the program; blocks inside of others are listed, too.

    Raises:
        TypeError: `fn` can't be called.

    Cost: a trace, and a search that grows with the number of equations.

    Examples:
        >>> def mlp(params, x):
        ...     for p in params["layers"]:
        ...         x = x + jax.nn.relu(x @ p["up"]) @ p["down"]
        ...     return x
        >>> layer = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 4))}
        >>> params = {"layers": [layer, layer, layer]}
        >>> blocks = jc.pruning.residual_blocks(mlp, params, jnp.ones((2, 4)))
        >>> [(block.name, block.leaves) for block in blocks][0]
        ('layers/0', ('layers/0/down', 'layers/0/up'))

    Source: Veit et al. 2016, arXiv:1605.06431, which drops blocks of a trained ResNet; Men et
    al. 2024, arXiv:2403.03853, which drops layers of a language model.
    """
    require_function("residual_blocks", fn)
    blocks = blocks_of(trace(fn, (params, *args), kwargs, parts=True))
    return layers_of(blocks) if whole_layers else blocks.listed


def drop_blocks(
    fn: Callable[..., PyTree],
    params: PyTree,
    dropped: Iterable[Dropped | ResidualBlock],
    *args: Any,
    **kwargs: Any,
) -> tuple[PyTree, Callable[..., PyTree]]:
    """Leaves blocks out: smaller params, and the function that runs them.

    Args:
        fn: any function `fn(params, *args, **kwargs)`.
        params: its params. Arrays, which may be traced, or `jax.ShapeDtypeStruct`s.
        dropped: static. Blocks of `jc.pruning.residual_blocks`, or a choice of
            `jc.pruning.select_blocks`. One inside of another goes with it.
        *args: any arguments that `fn` takes; it is traced with their shapes.
        **kwargs: the same.

    Returns:
        `(small_params, small_fn)`. Leaves that nothing else uses are None in `small_params`,
        an empty node of a pytree; of a scan over layers the rows of the layers that stay are
        left, in their order, and None if none stays. A leaf that the function changes before
        its rows go to the layers (a transpose, a product) stays whole. `small_fn(small_params,
        *args)` does nothing of what is left out. It is traced anew at each call and takes other
        shapes of `args`; it can be jitted, mapped and differentiated, and blocks can be dropped
        again. Blocks are found anew by their names. A custom derivative around a block gives
        way to that of what is left in it.

    Raises:
        TypeError: `fn` can't be called, or `dropped` holds something else.
        ValueError: the function has no such block; a block is named twice; `stays` does not have
            an entry for each layer; when called: leaves that don't fit.

    Cost: that of a trace at each call without `jit`, none with it.

    Examples:
        >>> def mlp(params, x):
        ...     for p in params:
        ...         x = x + jax.nn.relu(x @ p["up"]) @ p["down"]
        ...     return x
        >>> layer = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 4))}
        >>> x = jnp.ones((2, 4))
        >>> blocks = jc.pruning.residual_blocks(mlp, [layer, layer], x)
        >>> small, small_mlp = jc.pruning.drop_blocks(mlp, [layer, layer], blocks[1:], x)
        >>> small[1], bool((small_mlp(small, x) == mlp([layer], x)).all())
        ({'down': None, 'up': None}, True)
    """
    require_function("drop_blocks", fn)
    chosen = _as_dropped("drop_blocks", dropped)
    traced = trace(fn, (params, *args), kwargs, parts=True)
    blocks = blocks_of(traced)
    names, rows = _resolved("drop_blocks", blocks, chosen)
    drop = plan(blocks, dropped=names, rows=rows)
    before, graph = alive(blocks.state), blocks.state.graph
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths = [tree.path_string(path) for path, _ in flat]
    tree.require_distinct("drop_blocks", "params", paths)
    gone = {
        path
        for path, leaf in zip(traced.paths, graph.leaves, strict=True)
        if graph.weights[leaf] and leaf in before and leaf not in drop.live
    }
    cuts = {
        traced.paths[i]: (kept, loop.body.trips or 0)
        for name, kept in rows.items()
        if (loop := blocks.residuals[name].loop) is not None
        for i in blocks.residuals[name].leaves
    }
    old = {path: _shape(leaf) for path, (_, leaf) in zip(paths, flat, strict=True)}
    small = {}
    for path, (_, leaf) in zip(paths, flat, strict=True):
        if path not in gone:
            small[path] = rows_of(leaf, *cuts[path]) if path in cuts else leaf
    expected = {path: np.shape(leaf) if is_array(leaf) else None for path, leaf in small.items()}

    def small_fn(small_params: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        leaves = tree.by_path("drop_blocks", "params", small_params)
        _require_fitting(leaves, expected)
        stand_ins = jax.tree.unflatten(treedef, [_like(old[p], leaves, p, old) for p in paths])
        traced = trace(fn, (stand_ins, *args), kwargs, parts=True)
        blocks = blocks_of(traced)
        names, rows = _resolved("drop_blocks", blocks, chosen)
        arrays = [leaves.get(path) for path in paths if is_array(old[path])]
        values = [*arrays, *traced.leaves[len(arrays) :]]
        return traced.results(execute(plan(blocks, dropped=names, rows=rows), values)[0])

    return jax.tree.unflatten(treedef, [small.get(path) for path in paths]), small_fn


def gate_blocks(
    fn: Callable[..., PyTree], blocks: Iterable[ResidualBlock]
) -> Callable[..., PyTree]:
    """`fn` with gates on its blocks: the same shapes, and traced which blocks run.

    Args:
        fn: any function `fn(params, *args, **kwargs)`.
        blocks: static. Those with gates, of `jc.pruning.residual_blocks`.

    Returns:
        `gated(params, gates, *args, **kwargs)`, where `gates` are numbers or bools by the name of
        the block, for a scan over layers one for each layer: 0 leaves it out, anything else runs
        it. A block that is not in `gates` runs. Its result is that of `fn` without the block,
        as of `jc.pruning.drop_blocks`.

    Raises:
        TypeError: `fn` can't be called.
        ValueError: when called: the function has no such block, a gate has no block or another
            shape.

    Cost: that of `fn`: all blocks are computed.

    Examples:
        >>> fn = lambda p, x: x + jnp.tanh(x @ p["w"])
        >>> params, x = {"w": jnp.eye(2)}, jnp.ones(2)
        >>> gated = jc.pruning.gate_blocks(fn, jc.pruning.residual_blocks(fn, params, x))
        >>> jax.vmap(lambda gate: gated(params, {"w": gate}, x)[0])(jnp.array([0, 1]))
        Array([1.       , 1.7615942], dtype=float32)

    Source: Fan et al. 2019, arXiv:1909.11556, section 3 (LayerDrop), for gates drawn at random.
    """
    require_function("gate_blocks", fn)
    wanted = {block.name: block for block in blocks}

    def gated(params: PyTree, gates: Mapping[str, Any], *args: Any, **kwargs: Any) -> PyTree:
        traced = trace(fn, (params, *args), kwargs, parts=True)
        found, opened = blocks_of(traced), {}
        for name, gate in gates.items():
            if name not in wanted:
                raise ValueError(_unknown("gate_blocks", name, wanted))
            block, gate = wanted[name], jnp.asarray(gate).astype(bool)
            shape = (block.layers,) if block.layers else ()
            if gate.shape != shape:
                rule = f"have shape {list(shape)}"
                got = _check.describe(gate)
                raise ValueError(_check.message("gate_blocks", "gates", rule, got, path=name))
            for part in block.parts:
                opened[part] = opened[part] & gate if part in opened else gate
        for name in opened:
            if name not in found.residuals:
                raise ValueError(_unknown("gate_blocks", name, found.residuals))
        run = plan(found, gates=list(opened))
        return traced.results(execute(run, traced.leaves, opened)[0])

    return gated


def require_blocks(
    function: str, blocks: Iterable[ResidualBlock], found: Blocks | None = None
) -> tuple[ResidualBlock, ...]:
    """Refuses what are no blocks, none, or none of a function."""
    blocks = tuple(blocks)
    for block in blocks:
        if not isinstance(block, ResidualBlock):
            rule = "hold blocks of jc.pruning.residual_blocks"
            raise TypeError(_check.message(function, "blocks", rule, _check.describe(block)))
        for part in block.parts if found is not None else ():
            if found is not None and part not in found.residuals:
                raise ValueError(_unknown(function, part, found.residuals))
    if not blocks:
        rule = "hold at least one block"
        fix = "The function has none where jc.pruning.residual_blocks finds none."
        raise ValueError(_check.message(function, "blocks", rule, "none", fix))
    return blocks


def _as_dropped(function: str, dropped: Iterable[Dropped | ResidualBlock]) -> tuple[Dropped, ...]:
    found = []
    for item in dropped:
        if isinstance(item, ResidualBlock):
            item = Dropped(item, (False,) * item.layers)
        if not isinstance(item, Dropped):
            rule = "hold blocks of jc.pruning.residual_blocks or jc.pruning.select_blocks"
            raise TypeError(_check.message(function, "dropped", rule, _check.describe(item)))
        if len(item.stays) != item.block.layers:
            rule = f"say of {item.block.layers} layers which stay"
            got, name = f"{len(item.stays)} entries", item.block.name
            raise ValueError(_check.message(function, "dropped", rule, got, path=name))
        found.append(item)
    names = [part for item in found for part in item.block.parts]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        rule = "name each block once"
        raise ValueError(_check.message(function, "dropped", rule, twice))
    return tuple(found)


def _resolved(
    function: str, blocks: Blocks, dropped: Sequence[Dropped]
) -> tuple[list[str], dict[str, np.ndarray]]:
    """The names of the blocks to leave out, and the layers that stay of scans."""
    names, rows = [], {}
    for block, stays in dropped:
        for part in block.parts:
            residual = blocks.residuals.get(part)
            if residual is None:
                raise ValueError(_unknown(function, part, blocks.residuals))
            trips = 0 if residual.loop is None else residual.loop.body.trips
            if trips != block.layers:
                rule = f"have {block.layers} layers in {part!r}, as when the blocks were found"
                raise ValueError(_check.message(function, "fn", rule, trips))
        if not block.layers:
            names += block.parts
        elif not all(stays):
            rows[block.name] = np.flatnonzero(stays)
    return names, rows


def _unknown(function: str, name: str, known: Iterable[str]) -> str:
    rule = f"have a residual block {name!r} on these arguments"
    return _check.message(function, "fn", rule, f"{sorted(known)}", "Find the blocks anew.")


def _shape(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_array(leaf) else leaf


def _like(old: Any, leaves: Mapping[str, Any], path: str, shapes: Mapping[str, Any]) -> Any:
    """What stands for a leaf while tracing: of the old shape, and of the dtype that it has now."""
    if not is_array(old):
        return leaves.get(path, old)
    new = leaves.get(path)
    if new is not None:
        explicit = isinstance(new, jax.Array) and _sharding.is_explicit(new)
        sharding = jax.typeof(new).sharding if explicit else None
        return jax.ShapeDtypeStruct(old.shape, new.dtype, sharding=sharding)
    # A leaf that is gone follows the others that had its dtype.
    casts = [w.dtype for p, w in leaves.items() if is_array(w) and shapes[p].dtype == old.dtype]
    return jax.ShapeDtypeStruct(old.shape, casts[0] if casts else old.dtype)


def _require_fitting(leaves: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for path in dict.fromkeys((*expected, *leaves)):
        leaf: Any = leaves.get(path)
        shape = np.shape(leaf) if is_array(leaf) else None
        if (path in leaves) == (path in expected) and shape == expected[path]:
            continue
        rule = "be those that jc.pruning.drop_blocks returned, or have their shapes"
        got = "none" if path not in leaves else _check.describe(leaf)
        raise ValueError(_check.message("drop_blocks", "params", rule, got, path=path))
