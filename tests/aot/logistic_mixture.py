import json

from latent_engine.kernels.triton import logistic_mixture

from aot import spilled_bytes

TYPES = {**dict.fromkeys(("images_of_x", "K", "P", "parts"), "i32"), "mask": "*u8"}

results = {}
for C, masked, save, kind in ((1, False, False, "*fp32"), (1, True, True, "*bf16"), (3, False, False, "*fp32"),
                              (3, False, True, "*fp32"), (3, True, True, "*fp16")):
    constants = {"C": C, "ROWS": 10 if C == 3 else 3, "HAS_MASK": masked, "SAVE": save, "BLOCK": logistic_mixture.BLOCK}
    if not masked:
        constants["mask"] = None
    if not save:
        constants["stats"] = None
    for kernel in (logistic_mixture._forward, logistic_mixture._backward) if save else (logistic_mixture._forward,):
        results[f"{kernel.fn.__name__} C={C} masked={masked} save={save} {kind}"] = spilled_bytes(
            kernel, constants, {**TYPES, "params": kind, "grad_params": kind}, {"P"}, logistic_mixture.NUM_WARPS)
print(json.dumps(results))
