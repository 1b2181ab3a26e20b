"""Where nodes stand and lines run: layers, the channels between them, and lanes along both sides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from agentops.drawing.canvas import LEVEL, NORTH, Canvas, Style, cells_of, cut
from agentops.drawing.shape import Edge, Shape, backward, bundles, layers_of

Side = Literal["left", "right"]

_GAP = 3


def draw(shape: Shape, width: int = 100) -> list[list[tuple[str, Style | None]]]:
    """The drawing as lines of (text, style) runs, not wider than `width` where the names of the nodes allow it.

    `plain` makes a text of it.
    """
    canvas = _fitted(shape, max(20, width))
    return [canvas.runs(row) for row in range(canvas.height)]


@dataclass(slots=True)
class _Block:
    """A node with its place. `rows` are those in which lanes leave or reach it, counted from its top, by side and lane."""

    name: str
    label: str
    width: int
    height: int
    inside: Canvas | None = None
    bare: bool = False
    slot: int = 0
    x: int = 0
    y: int = 0
    rows: dict[tuple[int, str], int] = field(default_factory=dict)

    @property
    def middle(self) -> int:
        return self.x + self.width // 2

    def edge_column(self, side: Side) -> int:
        return self.x + (self.width - 1 if side == "right" else 0)


@dataclass(slots=True)
class _Net:
    """Edges drawn as one line: from some nodes above to some below, and to the lane of a side."""

    owner: int
    style: Style
    above: list[str] = field(default_factory=list)
    below: list[str] = field(default_factory=list)
    labels: dict[str, list[str]] = field(default_factory=dict)
    lane: _Lane | None = None


@dataclass(slots=True)
class _Lane:
    """Edges to one node along a side: between which layers, and how far out."""

    owner: int
    style: Style
    side: Side
    target: str
    sources: list[Edge]
    low: float = 0
    high: float = 0
    index: int = 0
    rows: list[int] = field(default_factory=list)


def _odd(number: int) -> int:
    return number | 1


def _fitted(shape: Shape, width: int) -> Canvas:
    """The widest arrangement that fits: layers of several nodes are broken into more layers until it does."""
    inside = {name: _fitted(inner, width - 8) for name, inner in shape.inner.items()}
    limit = width
    while True:
        canvas, widest = Drawing(shape, inside, limit).drawn()
        if canvas.width <= width or limit <= 0:
            return canvas
        limit = min(limit, widest) - max(1, canvas.width - width)


class Drawing:
    """One level of a graph, laid out and drawn."""

    def __init__(self, shape: Shape, inside: dict[str, Canvas], limit: int) -> None:
        self.shape = shape
        self.blocks = {name: self._block(name, label, inside.get(name)) for name, label in shape.nodes.items()}
        edges = [edge for edge in dict.fromkeys(shape.edges) if edge.source in self.blocks and edge.target in self.blocks]
        back = backward(list(self.blocks), edges, shape.start)
        self.layers = self._broken(layers_of(list(self.blocks), [edge for edge in edges if edge not in back]), limit)
        self.layer_of = {name: number for number, layer in enumerate(self.layers) for name in layer}
        near = [edge for edge in edges if edge not in back and self.layer_of[edge.target] == self.layer_of[edge.source] + 1]
        self.lanes = self._lanes([edge for edge in edges if edge not in near], back)
        self.channels = self._channels(near)
        for block in self.blocks.values():
            nets = [net for channel in self.channels for net in channel]
            ports = max(sum(block.name in net.above for net in nets), sum(block.name in net.below for net in nets))
            lanes = [self._at_side(block, side) for side in ("left", "right")]
            if block.bare and max(ports, *(len(into) + len(out) for into, out in lanes)) > 1:
                block.bare, block.width, block.height = False, 5, 3
            if not block.bare:
                block.width = max(block.width, 2 * ports + 3)
            self._give_rows(block)
        self.canvas = Canvas()

    def _block(self, name: str, label: str, inside: Canvas | None) -> _Block:
        if name in (self.shape.start, self.shape.end):
            return _Block(name, "●" if name == self.shape.start else "◉", 1, 1, bare=True)
        shown = cut(label)
        if inside is not None:
            return _Block(name, shown, max(inside.width, cells_of(shown)) + 4, inside.height + 2, inside)
        return _Block(name, shown, cells_of(shown) + 4, 3)

    def _broken(self, layers: list[list[str]], limit: int) -> list[list[str]]:
        def wide(names: list[str]) -> bool:
            return sum(self.blocks[name].width + _GAP for name in names) - _GAP > limit

        found: list[list[str]] = []
        for layer in layers:
            for rows in range(1, len(layer) + 1):
                each = -(-len(layer) // rows)
                parts = [layer[first : first + each] for first in range(0, len(layer), each)]
                if rows == len(layer) or not any(map(wide, parts)):
                    found += parts
                    break
        return found

    def _outer(self, name: str, side: Side) -> bool:
        """Whether nothing stands between a node and a side of the drawing."""
        return self.layers[self.layer_of[name]][-1 if side == "right" else 0] == name

    def _lanes(self, far: list[Edge], back: set[Edge]) -> list[_Lane]:
        made: dict[tuple[Side, str, bool], _Lane] = {}
        for edge in far:
            side: Side = "left" if edge in back else "right"
            style: Style = "choice" if edge.choice else "line"
            key = side, edge.target, edge.choice
            lane = made.setdefault(key, _Lane(1000 + len(made), style, side, edge.target, []))
            lane.sources.append(edge)
        for lane in made.values():
            ends = [self.layer_of[lane.target] - (0 if self._outer(lane.target, lane.side) else 0.5)]
            ends += [self.layer_of[one.source] + (0 if self._outer(one.source, lane.side) else 0.5) for one in lane.sources]
            lane.low, lane.high = min(ends), max(ends)
        for side in ("left", "right"):
            placed: list[_Lane] = []
            for lane in sorted((one for one in made.values() if one.side == side), key=lambda one: one.high - one.low):
                meets = {one.index for one in placed if one.low <= lane.high and lane.low <= one.high}
                lane.index = next(index for index in range(len(placed) + 1) if index not in meets)
                placed.append(lane)
        return list(made.values())

    def _at_side(self, block: _Block, side: Side) -> tuple[list[_Lane], list[_Lane]]:
        """The lanes that reach and that leave a node at its side, the innermost first."""
        if not self._outer(block.name, side):
            return [], []
        here = sorted((lane for lane in self.lanes if lane.side == side), key=lambda lane: lane.index)
        into = [lane for lane in here if lane.target == block.name]
        return into, [lane for lane in here if any(edge.source == block.name for edge in lane.sources)]

    def _give_rows(self, block: _Block) -> None:
        """A row for each lane that leaves or reaches a node at its side, so ordered that they do not cross there: what comes
        from above or goes up stands over what goes down or comes from below, the inner lane farther from the node's middle."""
        for side in ("left", "right"):
            into, out = self._at_side(block, side)
            upper, lower = ((into, "in"), (out, "out")) if side == "right" else ((out, "out"), (into, "in"))
            places = [(lane.owner, upper[1]) for lane in upper[0]] + [(lane.owner, lower[1]) for lane in reversed(lower[0])]
            if block.bare:
                block.rows.update(dict.fromkeys(places, 0))
                continue
            block.height = max(block.height, len(places) + 2)
            below = block.height - 1 - len(lower[0])
            block.rows.update({key: 1 + number for number, key in enumerate(places[: len(upper[0])])})
            if block.inside is None and not upper[0]:
                below = (block.height - 1) // 2 - (len(lower[0]) - 1) // 2
            block.rows.update({key: below + number for number, key in enumerate(places[len(upper[0]) :])})

    def _channels(self, near: list[Edge]) -> list[list[_Net]]:
        """For each layer, what runs between it and the next; the first is above the first layer."""
        channels: list[list[_Net]] = [[] for _ in range(len(self.layers) + 1)]
        for number in range(len(self.layers)):
            for choice in (False, True):
                here = [edge for edge in near if self.layer_of[edge.source] == number and edge.choice == choice]
                for group in bundles(here):
                    net = _Net(len(channels) * 10 + sum(map(len, channels)) + 1, "choice" if choice else "line")
                    net.above = list(dict.fromkeys(edge.source for edge in group))
                    net.below = list(dict.fromkeys(edge.target for edge in group))
                    for edge in group:
                        if edge.label and edge.label not in net.labels.setdefault(edge.target, []):
                            net.labels[edge.target].append(cut(edge.label))
                    channels[number + 1].append(net)
        for lane in self.lanes:
            inner = [edge.source for edge in lane.sources if not self._outer(edge.source, lane.side)]
            for layer in sorted({self.layer_of[name] for name in inner}):
                names = [name for name in dict.fromkeys(inner) if self.layer_of[name] == layer]
                channels[layer + 1].append(_Net(lane.owner, lane.style, above=names, lane=lane))
            if not self._outer(lane.target, lane.side):
                labels = {lane.target: [cut(edge.label) for edge in lane.sources if edge.label]}
                channels[self.layer_of[lane.target]].append(
                    _Net(lane.owner, lane.style, below=[lane.target], labels=labels, lane=lane)
                )
        return channels

    def drawn(self) -> tuple[Canvas, int]:
        """The canvas, and how wide its widest layer is."""
        widest = self._place_columns()
        y = 0
        for number in range(len(self.layers) + 1):
            y = self._channel(number, y)
            if number < len(self.layers):
                y = self._layer(self.layers[number], y)
        for lane in self.lanes:
            self._draw_lane(lane)
        for lane in self.lanes:
            if lane.side == "left":
                self._mark(lane)
        return self.canvas, widest

    def _reach(self, side: Side) -> int:
        """How far from the layers the innermost lane is: labels of its edges stand there."""
        told = [cells_of(cut(edge.label)) for lane in self.lanes if lane.side == side for edge in lane.sources if edge.label]
        return max(told) + 5 if told else 3

    def _place_columns(self) -> int:
        for name, block in self.blocks.items():
            nets = [net for channel in self.channels for net in channel]
            told = [cells_of(", ".join(net.labels[name])) for net in nets if net.labels.get(name)]
            block.slot = max(block.width, _odd(2 * (max(told) + 2)) if told else 0)
        totals = [sum(self.blocks[name].slot + _GAP for name in layer) - _GAP for layer in self.layers]
        widest = _odd(max(totals, default=1))
        lanes = {side: 1 + max((one.index for one in self.lanes if one.side == side), default=-1) for side in ("left", "right")}
        self._left = 2 * lanes["left"] + self._reach("left") - 2 if lanes["left"] else 0
        self._right = self._left + widest - 1
        for layer, total in zip(self.layers, totals, strict=True):
            x = self._left + (widest - total) // 2
            for name in layer:
                block = self.blocks[name]
                block.x = x + block.slot // 2 - block.width // 2
                x += block.slot + _GAP
        return widest

    def _lane_column(self, lane: _Lane) -> int:
        out = self._reach(lane.side) + 2 * lane.index
        return self._right + out if lane.side == "right" else self._left - out

    def _layer(self, layer: Sequence[str], y: int) -> int:
        tall = max(self.blocks[name].height for name in layer)
        for name in layer:
            block = self.blocks[name]
            block.y = y
            if block.bare:
                self.canvas.write(block.x, y, block.label, "name")
                continue
            self.canvas.box(block.x, y, block.width, block.height, square=block.inside is not None)
            if block.inside is not None:
                self.canvas.paste(block.inside, block.x + (block.width - block.inside.width) // 2, y + 1)
                self.canvas.write(block.x + 1, y, f" {block.label} ", "group")
            else:
                self.canvas.write(
                    block.x + (block.width - cells_of(block.label)) // 2, y + (block.height - 1) // 2, block.label, "name"
                )
        return y + tall

    def _ports(self, nets: list[_Net], ends: Callable[[_Net], list[str]]) -> dict[tuple[int, str], int]:
        """The column in which each net meets each node, by the net's place in the list."""
        found = {}
        for name, block in self.blocks.items():
            mine = [number for number, net in enumerate(nets) if name in ends(net)]
            mine.sort(key=lambda number: self._pull(nets[number]))
            for place, number in enumerate(mine):
                found[number, name] = block.middle if block.bare else block.middle + 2 * place - (len(mine) - 1)
        return found

    def _pull(self, net: _Net) -> float:
        if net.lane is not None:
            return self._lane_column(net.lane)
        columns = [self.blocks[name].middle for name in (*net.above, *net.below)]
        return sum(columns) / len(columns)

    def _channel(self, number: int, y: int) -> int:
        """Draws what runs above a layer, and says where the layer begins."""
        nets = self.channels[number]
        if not nets:
            return y + (1 if 0 < number < len(self.layers) else 0)
        above, below = self._ports(nets, lambda net: net.above), self._ports(nets, lambda net: net.below)
        spans = []
        for one, net in enumerate(nets):
            columns = [above[one, name] for name in net.above] + [below[one, name] for name in net.below]
            columns += [self._lane_column(net.lane)] if net.lane else []
            spans.append((min(columns), max(columns)))
        track_of = self._tracks(nets, spans, above, below)
        tracks = max(track_of.values(), default=-1) + 1
        told = any(net.labels.get(name) for net in nets for name in net.below)
        arrow = y + tracks + (1 if told or not tracks else 0)
        for one, net in enumerate(nets):
            turn = y + track_of.get(one, 0)
            for name in net.above:
                block = self.blocks[name]
                begin = block.y + block.height - (0 if block.bare else 1)
                self.canvas.down(above[one, name], begin, turn, net.owner, net.style)
                if block.bare:
                    self.canvas.way(above[one, name], begin, NORTH, net.owner, net.style)
            for name in net.below:
                self.canvas.down(below[one, name], turn, arrow, net.owner, net.style)
                self.canvas.write(below[one, name], arrow, "▼", net.style)
            if one in track_of:
                self.canvas.across(turn, *spans[one], net.owner, net.style)
            if net.lane:
                net.lane.rows.append(turn)
        for one, net in enumerate(nets):
            for name in net.below:
                said = ", ".join(net.labels.get(name, []))
                if said and self.canvas.free(below[one, name] + 2, arrow - 1, cells_of(said)):
                    self.canvas.write(below[one, name] + 2, arrow - 1, said, net.style)
        return arrow + 1

    def _tracks(
        self,
        nets: list[_Net],
        spans: list[tuple[int, int]],
        above: dict[tuple[int, str], int],
        below: dict[tuple[int, str], int],
    ) -> dict[int, int]:
        """A row for each net that turns, so that no two lie on each other. Where one comes down in the column in which another
        goes on, it turns first; where that cannot be, one arrives a column aside."""
        turning = [one for one, (low, high) in enumerate(spans) if low < high]
        track_of: dict[int, int] = {}
        while waiting := [one for one in turning if one not in track_of]:
            before = {
                one: [
                    other
                    for other in turning
                    if other != one
                    and {above[key] for key in above if key[0] == other} & {below[key] for key in below if key[0] == one}
                ]
                for one in waiting
            }
            ready = [one for one in waiting if all(other in track_of for other in before[one])]
            if not ready:
                blocked = waiting[0]
                taken = {above[key] for key in above if key[0] != blocked}
                for key in [key for key in below if key[0] == blocked and below[key] in taken]:
                    below[key] += 1
                    spans[blocked] = min(spans[blocked][0], below[key]), max(spans[blocked][1], below[key])
                continue
            one = min(ready, key=lambda one: (spans[one][1] - spans[one][0], spans[one]))
            low, high = spans[one]
            row = max((track_of[other] + 1 for other in before[one]), default=0)
            while any(
                track_of[other] == row and low <= spans[other][1] + 1 and spans[other][0] <= high + 1 for other in track_of
            ):
                row += 1
            track_of[one] = row
        return track_of

    def _draw_lane(self, lane: _Lane) -> None:
        column, out = self._lane_column(lane), 1 if lane.side == "right" else -1
        for edge in lane.sources:
            block = self.blocks[edge.source]
            if self._outer(edge.source, lane.side):
                row, begin = block.y + block.rows[lane.owner, "out"], block.edge_column(lane.side)
                self.canvas.across(row, begin + (out if block.bare else 0), column, lane.owner, lane.style)
                if block.bare:
                    self.canvas.way(begin + out, row, LEVEL, lane.owner, lane.style)
                lane.rows.append(row)
                if edge.label:
                    said = f" {cut(edge.label)} "
                    self.canvas.write(begin + 2 if out > 0 else begin - 1 - cells_of(said), row, said, lane.style)
        target = self.blocks[lane.target]
        if self._outer(lane.target, lane.side):
            row, end = target.y + target.rows[lane.owner, "in"], target.edge_column(lane.side)
            self.canvas.across(row, end + out, column, lane.owner, lane.style)
            self.canvas.write(end + out, row, "◄" if out > 0 else "►", lane.style)
            lane.rows.append(row)
        low, high = min(lane.rows), max(lane.rows)
        self.canvas.down(column, low, high, lane.owner, lane.style)

    def _mark(self, lane: _Lane) -> None:
        """Shows that a lane leads up, where nothing crosses it."""
        column = self._lane_column(lane)
        rows = range(min(lane.rows) + 1, max(lane.rows))
        marks = [row for row in rows if self.canvas.upright(column, row) and self.canvas.free(column + 1, row, 1)]
        if marks:
            self.canvas.write(column, marks[len(marks) // 2], "▲", lane.style)
