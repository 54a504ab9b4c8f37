import json

from latent_engine.kernels.triton import row_update

from aot import spilled_bytes

INTEGERS = ("B", "D", "table_row", "velocity_row", "mean_row", "square_row", "grad_row", "history_row", "first", "now", "terms")
FLOATS = ("lr", "momentum", "coupled", "kept", "log_beta1", "log_beta2", "beta1", "beta2", "fresh1", "fresh2", "eps")
TYPES = {**dict.fromkeys(INTEGERS, "i32"), **dict.fromkeys(FLOATS, "fp32"), "index": "*i64", "order": "*i64", "step": "*i32",
         "history": "*fp64"}

results = {}
for D in (1, 2, 50, 64, 512):
    shape = row_update.blocks(D)
    aligned = {"D", "table_row", "velocity_row", "mean_row", "square_row"} if D % 16 == 0 else set()
    for flag in (False, True):
        results[f"sgd D={D} velocity={flag}"] = spilled_bytes(
            row_update._sgd, {**shape, "HAS_VELOCITY": flag}, TYPES, aligned, row_update.NUM_WARPS)
        results[f"catch_up D={D} index={flag}"] = spilled_bytes(
            row_update._catch_up, {**shape, "HAS_INDEX": flag}, TYPES if flag else {**TYPES, "index": "*i32"}, aligned,
            row_update.NUM_WARPS)
    results[f"adam D={D}"] = spilled_bytes(row_update._adam, shape, TYPES, aligned, row_update.NUM_WARPS)
results["set_steps"] = spilled_bytes(row_update._set_steps, {"HAS_INDEX": True, "IS_ONE_MORE": False,
                                                             "BLOCK_N": row_update.STEPS}, TYPES, set(), row_update.NUM_WARPS)
print(json.dumps(results))
