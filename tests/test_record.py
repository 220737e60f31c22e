"""Classes of plain values, whose fields are declared once."""

from __future__ import annotations

from typing import Any

import pytest

from nocloud import record  # type: ignore[attr-defined]


@record
class Point:
    """Where something is."""

    x: int
    y: int = 7
    name: str = ""

    def __post_init__(self) -> None:
        self.name = self.name.upper()

    @property
    def both(self) -> tuple[int, int]:
        return self.x, self.y


def values(point: Point) -> tuple[int, int, str]:
    return point.x, point.y, point.name


def test_values_go_by_place_and_by_name() -> None:
    assert values(Point(1)) == (1, 7, "")
    assert values(Point(1, 2, "a")) == (1, 2, "A")
    assert values(Point(1, name="b")) == (1, 7, "B")
    assert values(Point(y=3, x=4)) == (4, 3, "")


def test_it_is_a_class_as_it_was_declared() -> None:
    assert (Point.__name__, Point.__module__, Point.__doc__) == ("Point", __name__, "Where something is.")
    assert Point(5).both == (5, 7)


@pytest.mark.parametrize(("given", "named"), [((), {}), ((1, 2, "a", 4), {}), ((1,), {"z": 3}), ((), {"y": 1})])
def test_what_is_missing_or_too_much_is_an_error(given: tuple[Any, ...], named: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="Point takes x, y, name"):
        Point(*given, **named)


def test_it_has_no_other_attributes() -> None:
    point: Any = Point(1)
    point.y = 5
    assert point.y == 5
    with pytest.raises(AttributeError):
        point.z = 1
