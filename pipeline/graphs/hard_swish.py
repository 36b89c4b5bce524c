"""HardSwish as one operator again: ONNX Runtime's optimizer writes it out as x * HardSigmoid(x).

Quantizers would then stand inside it, and no runtime would find the operator that it has a kernel for. In place on an
`onnx_ir.Model`, before quantization; the answers stay to float rounding.
"""

from __future__ import annotations

import math

import onnx_ir as ir

ALPHA, BETA = 1 / 6, 0.5  # HardSwish(x) = x * max(0, min(1, x / 6 + 1/2)), ONNX operator set 14
FIRST_OPSET = 14


def fuse_hard_swish(model: ir.Model) -> int:
    """Join each HardSigmoid of alpha 1/6 and beta 1/2 with the Mul that alone reads it; returns how many."""
    if model.graph.opset_imports.get("", 0) < FIRST_OPSET:
        return 0
    num_changed = 0
    for gate in [node for node in model.graph if node.op_type == "HardSigmoid" and _is_gate(node)]:
        product, x = gate.outputs[0].consumers()[0], gate.inputs[0]
        if product.op_type != "Mul" or x not in product.inputs or product.inputs[0] is product.inputs[1]:
            continue
        fused = ir.node("HardSwish", [x], name=product.name)
        model.graph.insert_before(product, fused)
        old, new = product.outputs[0], fused.outputs[0]
        new.shape, new.type = old.shape, old.type
        name = old.name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        model.graph.remove([product, gate], safe=True)
        new.name = name
        num_changed += 1
    return num_changed


def _is_gate(node: ir.Node) -> bool:
    alpha, beta = node.attributes.get_float("alpha", 0.2), node.attributes.get_float("beta", 0.5)
    alone = len(node.outputs[0].consumers()) == 1 and not node.outputs[0].is_graph_output()
    return alone and math.isclose(alpha, ALPHA, rel_tol=1e-6) and math.isclose(beta, BETA)
