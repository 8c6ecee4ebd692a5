"""The graph of a network with exits, cut into one graph for each stage."""

from typing import NamedTuple

import torch
from torch import SymInt, Tensor, fx, nn
from torch.export import ExportedProgram


class StageGraph(NamedTuple):
    module: nn.Module
    """From images, or from what the stage before handed on, to (logits (B, K), what goes on ...)."""
    carried: int
    """How many tensors go on; the rows of each are the images."""


def split_stages(program: ExportedProgram) -> list[StageGraph]:
    """Cut a program from images to the logits of all exits, shallow to deep, behind each exit.

    A stage is what its logits need and no earlier stage has; what later stages need of it goes on. What does not depend
    on the images, and sizes of the batch, is made anew in every stage.

    Raises:
        ValueError: something goes on whose rows are not the images.
    """
    graph_module = program.module()
    nodes = list(graph_module.graph.nodes)
    (images,) = (node for node in nodes if node.op == "placeholder")
    (output,) = (node for node in nodes if node.op == "output")
    logits = list(output.args[0])
    varies = _descendants(images, nodes)
    stage_of: dict[fx.Node, int] = {}
    for stage, node in enumerate(logits):
        for ancestor in _ancestors(node):
            if ancestor in varies and _is_tensor(ancestor):
                stage_of.setdefault(ancestor, stage)

    boundaries = [_carried(nodes, stage_of, stage) for stage in range(len(logits) - 1)]
    batch = images.meta["val"].shape[0]
    for node in (node for boundary in boundaries for node in boundary):
        if not node.meta["val"].ndim or node.meta["val"].shape[0] != batch:
            raise ValueError(
                f"the network cannot be cut into stages: {node.name} {tuple(node.meta['val'].shape)} goes from one to"
                " another, and its rows are not the images"
            )
    return [
        StageGraph(_extract(graph_module, before, node, after), len(after))
        for before, node, after in zip([[images], *boundaries], logits, [*boundaries, []])
    ]


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _descendants(root: fx.Node, nodes: list[fx.Node]) -> set[fx.Node]:
    found = {root}
    for node in nodes:
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found, waiting = set(), [node]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            waiting.extend(current.all_input_nodes)
    return found


def _carried(nodes: list[fx.Node], stage_of: dict[fx.Node, int], stage: int) -> list[fx.Node]:
    """Tensors of a stage or one before it that later ones take."""
    return [
        node
        for node in nodes
        if stage_of.get(node, stage + 1) <= stage
        and any(stage_of.get(user, -1) > stage for user in _tensor_users(node))
    ]


def _tensor_users(node: fx.Node) -> set[fx.Node]:
    """Who takes a tensor, also as one of several results; sizes do not count."""
    found: set[fx.Node] = set()
    for user in node.users:
        if _is_tensor(user):
            found.add(user)
        elif not _is_size(user):
            found |= _tensor_users(user)
    return found


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, SymInt))


def _extract(
    graph_module: fx.GraphModule, inputs: list[fx.Node], logits: fx.Node, carried: list[fx.Node]
) -> fx.GraphModule:
    """The graph from some nodes to others."""
    graph = fx.Graph()
    made = {node: graph.placeholder(f"input_{index}") for index, node in enumerate(inputs)}
    batch, first = inputs[0].meta["val"].shape[0], made[inputs[0]]

    def make(node: fx.Node) -> fx.Node:
        if node not in made:
            if _is_size(node) and node.target is torch.ops.aten.sym_size.int and node.meta["val"] == batch:
                made[node] = graph.call_function(torch.ops.aten.sym_size.int, (first, 0))
            else:
                made[node] = graph.node_copy(node, make)
        return made[node]

    wanted = _ancestors_until([logits, *carried], set(inputs))
    for node in graph_module.graph.nodes:  # in their order, so that no recursion is deep
        if node in wanted:
            make(node)
    graph.output((make(logits), *(make(node) for node in carried)))
    return fx.GraphModule(graph_module, graph)


def _ancestors_until(nodes: list[fx.Node], ends: set[fx.Node]) -> set[fx.Node]:
    found, waiting = set(), [node for node in nodes if node not in ends]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            if not (_is_size(current) and current.target is torch.ops.aten.sym_size.int):
                waiting.extend(source for source in current.all_input_nodes if source not in ends)
    return found
