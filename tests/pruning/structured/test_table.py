import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.pruning.structured._base import Dependencies, Frozen, Group, Member
from jaxcompress.pruning.structured._table import dependencies_text


def shapes_of(**sizes):
    return {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in sizes.items()}


def mlp(**changes):
    units = np.arange(16)
    members = (
        Member("a/kernel", 1, units),
        Member("a/bias", 0, units),
        Member("b/kernel", 0, units),
    )
    shapes = shapes_of(**{"a/kernel": (8, 16), "a/bias": (16,), "b/kernel": (16, 4)})
    frozen = (
        Frozen("a/kernel", 0, 8, "it is an argument"),
        Frozen("b/kernel", 1, 4, "it is a result of the function"),
    )
    group = Group("a/kernel[1]", 16, members)._replace(**changes)
    return Dependencies((group,), frozen, shapes)


def test_a_small_one_as_it_is_printed():
    assert (
        str(mlp())
        == """\
1 group of 16 units that can be removed

group        units  params each
a/kernel[1]     16           13
    a/kernel[1] 16, a/bias[0] 16, b/kernel[0] 16

2 axes of which positions stay
  it is an argument
    a/kernel[0] 8
  it is a result of the function
    b/kernel[1] 4"""
    )


def test_without_rich(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "rich", None)
    assert "a/kernel[1]" in str(mlp())


def test_why_it_is_not_exact():
    text = str(mlp(inexact="a softmax over the axis"))
    assert "    not exact: a softmax over the axis" in text.splitlines()
    assert "not exact" not in str(mlp())


def test_nothing_to_remove():
    assert str(Dependencies((), (), {})) == "0 groups of 0 units that can be removed"
    frozen = (Frozen("w", 0, 3, "sort at top"),)
    text = str(Dependencies((), frozen, shapes_of(w=(3,))))
    assert text.splitlines()[-2:] == ["  sort at top", "    w[0] 3"]
    assert "1 axis of which positions stay" in text


def test_parts_of_axes_several_positions_and_layers():
    value = np.full(96, -1)
    value[64:] = np.repeat(np.arange(4), 8)
    group = Group("qkv[2]", 4, (Member("qkv", 2, value),), (6,))
    text = str(Dependencies((group,), (), shapes_of(qkv=(6, 5, 96))))
    # Of one layer, 8 positions of 5 entries each.
    assert "qkv[2]  6 × 4           40" in text
    assert "    qkv[2] 32 of 96 (8 each)" in text
    assert "24 units" in text


def test_an_average_that_is_no_integer():
    uneven = np.array([0, 0, 1, -1])
    group = Group("w[0]", 2, (Member("w", 0, uneven),))
    assert "1.5" in str(Dependencies((group,), (), shapes_of(w=(4,))))


def layers(count, extra=()):
    groups, sizes = [], {}
    for i in range(count):
        up, down = f"layers/{i}/up", f"layers/{i}/down"
        sizes |= {up: (4, 8), down: (8, 4)}
        units = np.arange(8 if i not in extra else 4)
        members = (Member(up, 1, units), Member(down, 0, units))
        groups.append(Group(f"{up}[1]", len(units), members))
    return Dependencies(tuple(groups), (), shapes_of(**sizes))


def test_layers_that_are_alike_are_one_entry():
    lines = str(layers(12)).splitlines()
    assert lines[0] == "12 groups of 96 units that can be removed"
    assert len(lines) == 6
    assert lines[4].strip() == "layers/0/up[1] 8, layers/0/down[0] 8"
    assert lines[5].strip() == "and 11 alike, the last layers/11/up[1]"
    lines = str(layers(12, extra=(7,))).splitlines()
    assert any(line.startswith("layers/7/up[1]") for line in lines)
    assert "    and 10 alike, the last layers/11/up[1]" in lines


def test_members_that_are_alike_are_one_name():
    units = np.arange(8)
    members = [Member(f"layers/{i}/up", 0, units) for i in range(30)]
    sizes = {m.path: (8, 4) for m in members}
    text = str(Dependencies((Group("x[1]", 8, tuple(members)),), (), shapes_of(**sizes)))
    assert "    layers/0/up[0] 8 (and 29 alike)" in text.splitlines()


def test_long_lists_are_cut_and_say_so():
    units = np.arange(8)
    names = [chr(ord("a") + i) * 40 for i in range(26)]
    members = tuple(Member(name, 0, units) for name in names)
    sizes = dict.fromkeys(names, (8,))
    frozen = tuple(Frozen(name, 0, 8, "the same") for name in names)
    text = dependencies_text(Dependencies((Group("g", 8, members),), frozen, shapes_of(**sizes)))
    assert ", … 16 more" in text
    assert ", … 18 more" in text
    assert max(map(len, text.splitlines())) <= 120
    # One more than the most is written out: to say so would be as long.
    eleven = Dependencies((Group("g", 8, members[:11]),), (), shapes_of(**sizes))
    assert "more" not in str(eleven)
    many = tuple(Group(name, 8, (Member(name, 0, units),)) for name in names) * 2
    many = tuple(g._replace(name=f"{g.name}{'x' * (i // 26)}") for i, g in enumerate(many))
    text = str(Dependencies(many, (), shapes_of(**sizes)))
    assert "… 12 more groups, in `.groups`" in text
    reasons = tuple(Frozen("a" * 40, 0, 1, name) for name in names)
    text = str(Dependencies((), reasons, shapes_of(**sizes)))
    assert "… 6 more reasons, in `.frozen`" in text


def test_lines_are_at_most_120_wide_but_for_one_long_name():
    units = np.arange(8)
    name = "/".join(["module"] * 30)
    group = Group(f"{name}[0]", 8, (Member(name, 0, units),), inexact="word " * 60)
    lines = str(Dependencies((group,), (), shapes_of(**{name: (8,)}))).splitlines()
    assert all(len(line) <= 120 for line in lines if "module" not in line)
    assert all("\N{NO-BREAK SPACE}" not in line for line in lines)
