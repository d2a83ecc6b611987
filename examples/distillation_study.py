"""Compare ways to distil on handwritten digits: 5 seeds x 4 temperatures, one `vmap` for each.

    pip install -e ".[examples]" && python examples/distillation_study.py

The teacher, an MLP with two hidden layers of 128, has seen all 1347 images. The student, with one
hidden layer of 16, has 100 of them, labelled: few enough that there is something to gain, and
the teacher teaches it on no others. All students of a seed start from the same weights, see the
same batches and train for the same number of steps. Takes about two minutes on two CPU cores.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import digits
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcompress as jc
from jaxcompress import distillation as d

TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
TEACHER, STUDENT, IMAGES = (64, 128, 128, 10), (64, 16, 10), 100
BATCH = 32


class Setting(NamedTuple):
    """What a method may use to make its optimizer."""

    temperature: jax.Array
    steps: int
    key: jax.Array
    teacher: Any


Method = Callable[[Setting], optax.GradientTransformation]


def loss(params: dict[str, Any], x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(digits.logits(params, x), y).mean()


def outputs(params: dict[str, Any], x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The logits, and the values of the last hidden layer."""
    last = f"hidden{len(params) - 1}"
    logits, values = jc.capture(digits.logits, last)(params, x)
    return logits, values[last]


def adam(s: Setting) -> optax.GradientTransformation:
    """The optimizer of all methods, with one learning rate for all."""
    return optax.adam(optax.cosine_decay_schedule(5e-3, s.steps))


def distilled(taught: Callable[..., jax.Array], weight: float = 0.9, **options: Any) -> Method:
    """The labels' gradient with a tenth of the weight, and the gradient of `taught` besides.

    `taught` takes the student's and the teacher's outputs, the labels and the temperature.
    """

    def method(s):
        link = jc.distill(
            lambda params, batch: outputs(params, batch[0]),
            lambda batch: (outputs(s.teacher, batch[0]), batch[1]),
            weight=weight,
            task_weight=0.1,
            temperature=s.temperature,
            loss=lambda student, teacher, t, *own: taught(student, *teacher, t, *own),
            **options,
        )
        return optax.chain(link, adam(s))

    return method


def on_logits(taught: Callable[..., jax.Array]) -> Method:
    """A loss of the student's and the teacher's logits and the temperature."""
    return distilled(lambda s, t, y, heat: taught(s[0], t[0], heat))


def with_labels(taught: Callable[..., jax.Array]) -> Method:
    """A loss of both logits, the labels and the temperature."""
    return distilled(lambda s, t, y, heat: taught(s[0], t[0], y, heat))


def standardized(student: jax.Array, teacher: jax.Array, heat: jax.Array) -> jax.Array:
    """KD of logits with mean 0 and variance 1."""
    return jc.kd_loss(d.standardize_logits(student), d.standardize_logits(teacher), heat)


def with_features(taught: Callable[..., jax.Array]) -> Method:
    """KD, and a loss of the student's and the teacher's hidden values."""

    def both(s, t, y, heat):
        return jc.kd_loss(s[0], t[0], heat).mean() + taught(s[1], t[1]).mean()

    return distilled(both)


def hint(s: Setting) -> optax.GradientTransformation:
    """KD, and FitNets' regression of the teacher's hidden values, trained in the optimizer."""
    shapes = (jax.ShapeDtypeStruct((BATCH, n), jnp.float32) for n in (STUDENT[-2], TEACHER[-2]))
    adapter = d.linear_adapter()(*shapes)

    def both(student, teacher, y, heat, own):
        hidden = d.hint_loss(adapter.apply(own, student[1]), teacher[1])
        return jc.kd_loss(student[0], teacher[0], heat).mean() + hidden.mean()

    own = adapter.init(s.key)
    return distilled(both, regressors=own, regressor_optimizer=adam(s))(s)


def teacher_free(s: Setting) -> optax.GradientTransformation:
    """Soft labels that no teacher made."""
    return distilled(lambda s, t, y, heat: d.teacher_free_loss(s[0], y, heat))(s)


def kd(student: Any, teacher: Any, y: jax.Array, heat: jax.Array) -> jax.Array:
    """Hinton's loss."""
    return jc.kd_loss(student[0], teacher[0], heat)


METHODS: dict[str, Method] = {
    "student alone": adam,
    "teacher-free": teacher_free,
    "KD": distilled(kd),
    "KD, standardized": on_logits(standardized),
    "reverse KL": on_logits(lambda s, t, heat: heat**2 * d.reverse_kl(s, t, heat)),
    "DIST": on_logits(d.dist_loss),
    "DKD": with_labels(functools.partial(d.dkd_loss, beta=2.0)),
    "NKD": with_labels(d.nkd_loss),
    "hint + KD": hint,
    "RKD + KD": with_features(lambda s, t: d.rkd_distance(s, t) + 2 * d.rkd_angle(s, t)),
    "similarity + KD": with_features(d.similarity_preserving),
}


def study(name: str, data: Any, steps: int, seeds: list[int]) -> np.ndarray:
    """Test accuracy, `[temperature, seed]`: a single program. The teacher's for "teacher"."""
    x, y, x_test, y_test = data

    def accuracy(params):
        return jnp.mean(digits.logits(params, x_test).argmax(-1) == y_test)

    def run(temperature, seed):
        keys = jax.random.split(jax.random.key(seed), 5)
        plain = optax.adam(optax.cosine_decay_schedule(5e-3, steps))
        start = digits.initial(keys[0], TEACHER)
        teacher, _ = digits.trained(plain, loss, start, x, y, keys[1], steps, 64)
        if name == "teacher":
            return accuracy(teacher)
        opt = METHODS[name](Setting(temperature, steps, keys[2], teacher))
        few, start = slice(IMAGES), digits.initial(keys[3], STUDENT)
        params, _ = digits.trained(opt, loss, start, x[few], y[few], keys[4], steps, BATCH)
        return accuracy(params)

    over = jax.vmap(jax.vmap(run, (0, None)), (None, 0), out_axes=1)
    return np.asarray(jax.jit(over)(jnp.asarray(TEMPERATURES), jnp.asarray(seeds)))


def main() -> None:
    """Runs all methods, prints the table, draws the picture and writes the record."""
    columns = [f"T = {t:g}" for t in TEMPERATURES]
    digits.run(
        __doc__ or "",
        ["teacher", *METHODS],
        study,
        lambda found: digits.table(found, "method", columns),
        lambda found, path: digits.picture(found, TEMPERATURES, "temperature", path),
        temperatures=TEMPERATURES,
        images=IMAGES,
    )


if __name__ == "__main__":
    main()
