"""`python -m latent_engine.bench`: times ops and the training epoch, prints tables, writes JSON and plots."""

import argparse
import importlib
import sys
from pathlib import Path

from latent_engine.kernels import reference

from .report import print_result, print_summary, write_json, write_plot
from .suite import run_case
from .timing import measure_ceilings

# The files here that are named after an op, which has its reference in a file of that name.
SUITES = tuple(sorted({path.stem for path in Path(__file__).parent.glob("[!_]*.py")}
                      & {path.stem for path in Path(reference.__file__).parent.glob("*.py")}))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m latent_engine.bench", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"any of {', '.join(SUITES)} and dgd (default: all)")
    parser.add_argument("--case", action="append", help="only this case; may be repeated")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes 10 s a case")
    parser.add_argument("--json", metavar="PATH", help="write the results there")
    parser.add_argument("--plot", metavar="PATH", help="write a chart of the ratios there (PNG or SVG)")
    options = parser.parse_args(arguments)
    wanted = options.suites or [*SUITES, *(["dgd"] if options.device == "cpu" else [])]
    unknown = [name for name in wanted if name not in (*SUITES, "dgd")]
    if unknown:
        parser.error(f"unknown suite {unknown[0]!r}; the suites are {', '.join(SUITES)} and dgd")
    suites = [suite for name in wanted if name in SUITES for suite in importlib.import_module(f"{__package__}.{name}").SUITES]
    known = [case for suite in suites for case in suite.cases]
    for case in options.case or ():
        if case not in known:
            parser.error(f"no case {case!r}; the cases are {', '.join(known)}")
    for path in filter(None, (options.json, options.plot)):
        try:  # before the minutes of measuring
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).open("a").close()
        except OSError as error:
            parser.error(f"{path} cannot be written ({error.strerror}); choose another path")

    ceilings = measure_ceilings(options.device)
    print(f"ceilings: {ceilings.bytes / 1e9:.1f} GB/s copied, {ceilings.fmas / 1e9:.0f} GFMA/s, "
          f"{ceilings.exps / 1e9:.2f} Gexp/s, {ceilings.operations / 1e9:.0f} G operations/s, "
          f"{1e6 * ceilings.tape:.1f} µs of autograd")
    results = []
    for suite in suites:
        for case in (c for c in suite.cases if not options.case or c in options.case):
            for backward in suite.directions:
                results.append(run_case(suite, case, backward, options.device, ceilings, not options.no_compile))
                print_result(results[-1])
                if options.json:  # as far as it is: an interrupt costs one case
                    write_json(options.json, options.device, ceilings, results, None)
    epoch = None
    if "dgd" in wanted:
        from .dgd import run_epoch

        epoch = run_epoch(compiled=not options.no_compile)
    print_summary(results)
    if options.json:
        write_json(options.json, options.device, ceilings, results, epoch)
        print(f"written: {options.json}")
    if options.plot:
        write_plot(options.plot, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
