"""Contrastive representation distillation: with a memory bank as state, and within a batch."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress import _check
from jaxcompress._products import product
from jaxcompress._sharding import automatic
from jaxcompress._types import ArrayLike
from jaxcompress.distillation._batches import ALL, masked, read, rows_of, unit
from jaxcompress.distillation._rows import ids_below, require_temperature, softmax


class CrdState(NamedTuple):
    """State of `crd_loss`: features of every example, and what scores are normalized by.

    Attributes:
        student: [examples, features], of the student, each of length about 1.
        teacher: the same, of the teacher.
        student_log_z: float32 scalar, logarithm of the constant for student's anchors.
        teacher_log_z: float32 scalar, for teacher's anchors.
        started: boolean scalar, whether the two constants are set.
    """

    student: jax.Array
    teacher: jax.Array
    student_log_z: jax.Array
    teacher_log_z: jax.Array
    started: jax.Array


def crd_init(
    key: jax.Array,
    examples: int,
    features: int,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> CrdState:
    """A memory bank of random features, its constants not yet set.

    Args:
        key: one key of `jax.random`.
        examples: static. How many there are in the training set; their ids are 0 to
            `examples - 1`.
        features: static. How many each has, after the regressors of student and teacher.
        dtype: static. In which the bank is stored.

    Returns:
        A `CrdState`. The constants are estimated from the first batch, as in the authors'
        program; `state._replace(started=jnp.array(True))` has them 1, as in the paper.

    Raises:
        TypeError: `key` is not one key, a size is not a static integer.
        ValueError: there are fewer than two examples or no features.

    Examples:
        >>> state = jc.distillation.crd_init(jax.random.key(0), examples=100, features=8)
        >>> state.student.shape
        (100, 8)

    Source: Tian et al. 2020, arXiv:1910.10699; the range from their program.
    """
    _check.key("crd_init", key)
    _check.integer("crd_init", "examples", examples, 2)
    _check.integer("crd_init", "features", features, 1)
    side = math.sqrt(3.0 / features)
    # One bank after the other: none of them depends on how many there are.
    student, teacher = (
        jax.random.uniform(k, (examples, features), dtype, -side, side)
        for k in jax.random.split(key)
    )
    zero = jnp.zeros((), jnp.float32)
    return CrdState(student, teacher, zero, zero, jnp.array(False))


def crd_negatives(key: jax.Array, index: ArrayLike, count: int, *, examples: int) -> jax.Array:
    """Ids of other examples for each row, uniform and with repeats.

    Args:
        key: one key of `jax.random`; a new one at each step.
        index: integers [batch], the ids of the rows' own examples.
        count: static. How many for each row.
        examples: static. How many there are.

    Returns:
        int32 [batch, count]; no id is its row's own. Where the classes are known, draw your
        own ids from other classes instead: `crd_loss` takes any.

    Raises:
        TypeError: `key` is not one key, `index` not integers, a size not a static integer.
        ValueError: there are fewer than two examples or no negatives; `index` is not [batch].

    Examples:
        >>> ids = jc.distillation.crd_negatives(
        ...     jax.random.key(0), jnp.arange(3), 50, examples=4)
        >>> ids.shape, bool((ids == jnp.arange(3)[:, None]).any()), ids.max()
        ((3, 50), False, Array(3, dtype=int32))

    Source: Tian et al. 2020, arXiv:1910.10699, section 3.1. Differs from their program, which
    may draw the row's own example as its negative.
    """
    _check.key("crd_negatives", key)
    _check.integer("crd_negatives", "count", count, 1)
    _check.integer("crd_negatives", "examples", examples, 2)
    index = _ids("crd_negatives", "index", index, 1).astype(jnp.int32)
    step = jax.random.randint(key, (index.shape[0], count), 1, examples, jnp.int32)
    return (index[:, None] + step) % examples


def crd_loss(
    student: ArrayLike,
    teacher: ArrayLike,
    index: ArrayLike,
    negatives: ArrayLike,
    state: CrdState,
    temperature: ArrayLike = 0.1,
    momentum: ArrayLike = 0.5,
    *,
    where: ArrayLike | None = None,
) -> tuple[jax.Array, CrdState]:
    r"""Tells a row's own example in the other model from N others, which a memory bank holds.

    .. math:: L = -\log h(s, \bar t_0) - \sum_{j=1}^N \log\bigl(1 - h(s, \bar t_j)\bigr)
        - \log h(t, \bar s_0) - \sum_{j=1}^N \log\bigl(1 - h(t, \bar s_j)\bigr), \quad
        h(a, b) = \frac{e^{a \cdot b / \tau} / Z}{e^{a \cdot b / \tau} / Z + N / M}

    Args:
        student: :math:`s`, features [batch, features] after the student's regressor, any real
            float dtype; they are brought to length 1 here.
        teacher: :math:`t`, the same shape, after the teacher's regressor, which is trained too.
        index: integers [batch], the ids of the rows' examples, 0 to M - 1, no two alike: of two
            alike only one is kept in the bank. What does not count may have any. A row that
            counts and has another id, negative too, is NaN and is not kept in the bank.
        negatives: integers [batch, N], ids of other examples, see `crd_negatives`; 0 to M - 1,
            or the row is NaN, as for `index`.
        state: from `crd_init`, of :math:`M` examples, or from the step before.
        temperature: :math:`\tau > 0`. May be traced: NaN for a traced one that is not above 0.
        momentum: of the bank, in [0, 1]: the share of what was there. May be traced.
        where: booleans [batch]: which rows count. The others are not read: they may be NaN.

    Returns:
        The loss, one number per row, [batch], at least 0; float64 if a feature is, otherwise
        float32. And the next state, to carry on from: of the same structure and dtypes, the
        rows that count mixed into the bank, the constants :math:`Z` (the mean of
        :math:`e^{a \cdot b / \tau}` in the first batch, times M) set by the first call and then
        kept. No gradient flows into or out of states.

    Raises:
        TypeError: the features are not real floating point, ids not integers, `where` is not
            boolean; raised while tracing.
        ValueError: shapes differ from each other or from the bank's; there are no negatives; a
            known `temperature` is not above 0 or `momentum` not in [0, 1].

    Cost: reads batch (N + 1) rows of each bank, and multiplies each by one row.

    Examples:
        >>> key, x, ids = jax.random.key(0), jnp.eye(3), jnp.arange(3)
        >>> state = jc.distillation.crd_init(key, examples=10, features=3)
        >>> negatives = jc.distillation.crd_negatives(key, ids, 4, examples=10)
        >>> def mean_loss(student, state):
        ...     loss, state = jc.distillation.crd_loss(student, x, ids, negatives, state)
        ...     return loss.mean(), state
        >>> grads, state = jax.grad(mean_loss, has_aux=True)(x[::-1], state)
        >>> bool(state.started), state.teacher.shape
        (True, (10, 3))

    Source: Tian et al. 2020, arXiv:1910.10699, section 3; Z and the momentum from their
    program. Differs: logarithms throughout, where that adds 1e-7.
    """
    name = "crd_loss"
    require_temperature(name, temperature, ())
    _check.number(name, "momentum", momentum, 0.0, 1.0)
    _require_vectors(name, student)
    student, teacher, keep = read(name, student, teacher, where, ALL)
    index, negatives = _ids(name, "index", index, 1), _ids(name, "negatives", negatives, 2)
    _require_sizes(name, student, index, negatives, state)
    examples = min(state.student.shape[0], state.teacher.shape[0])
    index, negatives = ids_below(examples, index), ids_below(examples, negatives)
    temperature = jnp.asarray(temperature, student.dtype)
    momentum = jnp.asarray(momentum, student.dtype)
    columns = jnp.concatenate([index[:, None], negatives], 1)
    # A number that is traced can't be refused: no row counts, and the state stays.
    sound = (temperature > 0) & (momentum >= 0) & (momentum <= 1)
    in_order = jnp.all(columns < examples, 1) & sound
    used = keep & in_order
    columns = jnp.where(used[:, None], columns, 0)
    ours, theirs = unit(student), unit(teacher)
    state = jax.tree.map(jax.lax.stop_gradient, state)

    def critic(anchors, bank, log_z):
        scores = automatic(_scores, anchors, bank, columns, like_first=False) / temperature
        estimate = jax.lax.stop_gradient(_log_z(scores, used, bank.shape[0]))
        log_z = jnp.where(state.started, log_z.astype(scores.dtype), estimate)
        # The logit of h: no digits are lost in the logarithms of h and of 1 - h.
        logits = scores - log_z - math.log(negatives.shape[1] / bank.shape[0])
        own, others = logits[:, 0], logits[:, 1:]
        return jax.nn.softplus(-own) + jnp.sum(jax.nn.softplus(others), 1), log_z

    def moved(bank, anchors):
        return automatic(_mix, bank, anchors, index, used, momentum, like_first=True)

    loss, log_z = critic(ours, state.teacher, state.student_log_z)
    loss_back, log_z_back = critic(theirs, state.student, state.teacher_log_z)
    new = CrdState(
        moved(state.student, ours),
        moved(state.teacher, theirs),
        log_z.astype(state.student_log_z.dtype),
        log_z_back.astype(state.teacher_log_z.dtype),
        state.started | jnp.any(used),
    )
    loss = jnp.where(in_order, loss + loss_back, jnp.nan)
    return masked(loss, keep), jax.tree.map(jax.lax.stop_gradient, new)


def info_nce_loss(
    student: ArrayLike,
    teacher: ArrayLike,
    temperature: ArrayLike = 0.1,
    *,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Tells a row's own teacher features from those of the other rows of the batch.

    .. math:: L_i = -\frac{1}{2} \log \frac{e^{s_i \cdot t_i / \tau}}
        {\sum_j e^{s_i \cdot t_j / \tau}}
        - \frac{1}{2} \log \frac{e^{s_i \cdot t_i / \tau}}{\sum_j e^{s_j \cdot t_i / \tau}}

    It needs no memory bank, but large batches.

    Args:
        student: :math:`s`, features [batch, features] after the student's regressor, any real
            float dtype; they are brought to length 1 here.
        teacher: :math:`t`, the same shape.
        temperature: :math:`\tau > 0`. May be traced: NaN for a traced one that is not above 0.
        where: booleans [batch]: which rows count. The others are not read: they may be NaN.

    Returns:
        One number per row, [batch], at least 0; float64 if an argument is, otherwise float32
        (bfloat16 and float16 are computed in float32). Rows that do not count, and a row
        alone, have 0 and zero gradients.

    Raises:
        TypeError: the features are not real floating point, `where` is not boolean; raised
            while tracing.
        ValueError: the shapes differ or are not [batch, features]; a known `temperature` is not
            above 0.

    Cost: one product [b, features] x [features, b].

    Examples:
        >>> loss = jc.distillation.info_nce_loss(jnp.eye(2), jnp.eye(2), temperature=1.0)
        >>> np.asarray(loss).round(4)
        array([0.3133, 0.3133], dtype=float32)

    Source: van den Oord et al. 2018, arXiv:1807.03748, equation 4; in both directions as in
    Radford et al. 2021, arXiv:2103.00020, section 2.3.
    """
    name = "info_nce_loss"
    require_temperature(name, temperature, ())
    _require_vectors(name, student)
    student, teacher, keep = read(name, student, teacher, where, ALL)
    temperature = jnp.asarray(temperature, student.dtype)
    return automatic(_in_batch, student, teacher, temperature, rows_of(keep), like_first=False)


def _in_batch(student, teacher, temperature, rows):
    scores = product(unit(student), unit(teacher).T)
    pairs = rows[:, None] & rows[None]
    forth, back = (softmax(x, temperature, pairs).logs for x in (scores, scores.T))
    return -0.5 * (jnp.diagonal(forth) + jnp.diagonal(back))


def _scores(anchors, bank, columns):
    """Products of each anchor with the bank's rows of its columns, [batch, columns]."""
    rows = bank[columns].astype(anchors.dtype)
    return jnp.einsum("bf,bnf->bn", anchors, rows, precision=jax.lax.Precision.HIGHEST)


def _log_z(scores, keep, examples):
    """Logarithm of the scores' mean exponential in the rows that count, times the examples."""
    count = jnp.sum(keep, dtype=scores.dtype) * scores.shape[1]
    total = jax.nn.logsumexp(scores, where=keep[:, None])
    return jnp.where(count > 0, total - jnp.log(count) + math.log(examples), 0.0)


def _mix(bank, features, index, keep, momentum):
    """The bank with some rows moved towards their features, and brought to length 1."""
    old = bank[index].astype(features.dtype)
    rows = unit(momentum * old + (1.0 - momentum) * features).astype(bank.dtype)
    # Out of bounds, so dropped, where a row does not count.
    return bank.at[jnp.where(keep, index, bank.shape[0])].set(rows, mode="drop")


def _ids(function, name, ids, ndim):
    rule = "be integer ids " + ("[batch]" if ndim == 1 else "[batch, negatives]")
    got = _check.describe(ids)
    if not hasattr(ids, "dtype") or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(_check.message(function, name, rule, got))
    if ids.ndim != ndim:
        raise ValueError(_check.message(function, name, rule, got))
    return jnp.asarray(ids)


def _require_vectors(function, student):
    if getattr(student, "ndim", 2) != 2:
        rule, got = "be features [batch, features]", _check.describe(student)
        fix = "Pool positions first."
        raise ValueError(_check.message(function, "student", rule, got, fix))


def _require_sizes(function, student, index, negatives, state):
    batch, features = student.shape
    for bank in (state.student, state.teacher):
        if bank.ndim != 2 or bank.shape[1] != features:
            rule, got = f"hold banks [examples, {features}]", _check.describe(bank)
            raise ValueError(_check.message(function, "state", rule, got))
    for name, ids in {"index": index, "negatives": negatives}.items():
        if ids.shape[0] != batch or 0 in ids.shape[1:]:
            rule = f"have ids for each of the {batch} rows"
            raise ValueError(_check.message(function, name, rule, _check.describe(ids)))
