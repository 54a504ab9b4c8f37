import json

from latent_engine.kernels.triton import likelihood

from aot import spilled_bytes

TYPES = {**dict.fromkeys(("S", "N", "P", "s_rows", "n_rows", "n_chunks", *(f"{t}_{d}" for t in "xabmg" for d in "snp")), "i32"),
         "mask": "*u8"}

results = {}
for kind in range(4):
    for P, masked, a_type, modes in ((784, False, "*fp32", (0, 1, 1)), (3072, True, "*bf16", (2, 1, 3))):
        constants = {"KIND": kind, "HAS_MASK": masked, "BLOCK": likelihood.block_of(P),
                     **dict(zip(("MODE_X", "MODE_A", "MODE_B"), modes, strict=True))}
        for kernel in (likelihood._forward, likelihood._backward):
            name = f"{kernel.fn.__name__} kind={kind} P={P} masked={masked} {a_type}"
            results[name] = spilled_bytes(kernel, constants, {**TYPES, "a": a_type, "out_a": a_type}, {"P"} if P % 16 == 0
                                          else set(), likelihood.NUM_WARPS)
print(json.dumps(results))
