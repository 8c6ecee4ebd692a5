"""Cut the exported graph of a network with exits into one graph for each stage.

`torch.fx.passes.split_module` does not replace this: its parts take every weight and the size of the batch as inputs,
and hand tensors past the stages in between.
"""

import torch
from torch import SymInt, Tensor, fx
from torch.export import ExportedProgram


def split_stages(program: ExportedProgram) -> list[fx.GraphModule]:
    """Cut a program from images to the logits of all exits, shallow to deep, behind each exit.

    A stage takes images, or what the stage before handed on, and gives (logits (B, K), what goes on ...). It computes
    what its logits need and no earlier stage has. What does not depend on the images, and sizes of the batch, is
    computed anew in every stage.

    Raises:
        ValueError: something goes on whose rows are not the images.
    """
    # without operations in place: a tensor's users in the graph are then all that depends on it
    graph_module = program.run_decompositions({}).module()
    nodes = list(graph_module.graph.nodes)
    (images,) = (node for node in nodes if node.op == "placeholder")
    (output,) = (node for node in nodes if node.op == "output")
    logits = list(output.args[0])
    boundaries = _find_boundaries(nodes, images, logits)
    batch = images.meta["val"].shape[0]
    for node in (node for boundary in boundaries for node in boundary):
        if not node.meta["val"].ndim or node.meta["val"].shape[0] != batch:
            raise ValueError(
                f"the network cannot be cut into stages: {node.name} {tuple(node.meta['val'].shape)} goes from one to"
                " another, and its rows are not the images"
            )
    return [
        _extract(graph_module, inputs, [node, *carried])
        for inputs, node, carried in zip([[images], *boundaries], logits, [*boundaries, []])
    ]


def _find_boundaries(nodes: list[fx.Node], images: fx.Node, logits: list[fx.Node]) -> list[list[fx.Node]]:
    """For each stage but the last, the tensors that it or an earlier stage computes and a later stage takes."""
    varies = {images}
    for node in nodes:
        if not varies.isdisjoint(node.all_input_nodes):
            varies.add(node)
    first: dict[fx.Node, int] = {}  # the stage that computes a node
    last: dict[fx.Node, int] = {}  # the last stage that takes its values, not just its size
    for node in reversed(nodes):
        users = [user for user in node.users if user in first]
        uses = [first[user] for user in users] + [stage for stage, found in enumerate(logits) if found is node]
        if uses:
            first[node] = min(uses)
        # an operation with several results, such as a split, is repeated in each stage that takes one of them
        last[node] = max((first[user] if _is_tensor(user) else last[user] for user in users), default=-1)
        if _is_size(node):
            last[node] = -1
    return [
        [node for node in nodes if node in varies and _is_tensor(node) and first.get(node, stage) <= stage < last[node]]
        for stage in range(len(logits) - 1)
    ]


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, SymInt))


def _extract(graph_module: fx.GraphModule, inputs: list[fx.Node], outputs: list[fx.Node]) -> fx.GraphModule:
    """The part of a graph between some nodes and others, with the weights that it takes."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(f"input_{index}") for index, node in enumerate(inputs)}
    placeholders = set(copies.values())
    batch, first = inputs[0].meta["val"].shape[0], copies[inputs[0]]
    for node in graph_module.graph.nodes:
        if node.target is torch.ops.aten.sym_size.int and node.meta["val"] == batch:
            copies[node] = graph.call_function(node.target, (first, 0))
    graph.graph_copy(graph_module.graph, copies)
    graph.output(tuple(copies[node] for node in outputs))
    # also assertions of other stages go, which eliminate_dead_code keeps by default
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op == "output" or node in placeholders)
    return fx.GraphModule(graph_module, graph)
