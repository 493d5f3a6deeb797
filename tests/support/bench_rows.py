"""Make up rows as a run of the benchmarks has them."""

from __future__ import annotations

from benchmarks.measure import moments, solvers
from benchmarks.measure.solvers import large_title, small_title
from benchmarks.report import targets


def ok(workload, contender, seconds, suite="steps"):
    return {
        "suite": suite, "workload": workload, "contender": contender, "status": "ok", "seconds": seconds,
        "p10": seconds, "p90": seconds, "share_of_copy": 0.5, "bytes": 8, "bytes_per_second": 1.0, "adds_noise": False,
    }  # fmt: skip


def of_bfloat16(contender, error):
    kind = {"suite": "accuracy", "solver": "ddim", "dtype": "bfloat16"}
    return {**kind, "contender": contender, "status": "ok", "error": error, "seconds": 1e-5}


def rows_of_a_run(ours=1.0):
    large, small = targets._LARGE, targets._SMALL
    return [
        ok(large, "fastguide out=", 1.1 * ours),
        ok(large, "copy_ of the same bytes", 1.0),
        ok(large, "torch.compile out=", 1.1),
        ok(large, "fastguide", 1.1 * ours),
        ok(large, "torch.compile", 1.1),
        ok(large, "torch.compile max-autotune", 1.2),
        ok(small, "fastguide out=", 0.1),
        ok(small, "torch.compile out=", 0.3),
        ok(small, "fastguide", 0.1 * ours),
        ok(small, "torch.compile", 0.4),
        ok(small, "fastguide's scheduler", 0.18),
        ok(small, "diffusers", 1.0),
        ok("an idle model, DDIM", "Sampler, host time a step", 1e-5, "loops"),
        ok(targets._PIPELINE, "diffusers", 5e-3, "pipelines"),
        ok(targets._PIPELINE, targets._ACCELERATED, 2e-3, "pipelines"),
        ok(targets._PIPELINE, "fastguide, step(guidance_scale=)", 1.5e-3, "pipelines"),
        ok(targets._RESCALED, "diffusers", 6e-3, "pipelines"),
        ok(targets._RESCALED, targets._ACCELERATED, 5e-3, "pipelines"),
        *(
            ok(moments.title(name, (8, 4, 128, 128)), *contender, "moments")
            for name in targets._GUIDERS
            for contender in (("fastguide", 1e-4), ("diffusers", 1e-1))
        ),
        *(
            ok(moments.title("rescaled", shape), moments.PLAIN, 1e-4, "moments") | {moments.RATIO: 1.2}
            for shape in ((2, 4, 64, 64), (64, 3, 256, 256))
        ),
        ok(moments.title("rescaled", (2, 4, 64, 64)), "fastguide", 1e-5, "moments"),
        ok(moments.title("rescaled", (2, 4, 64, 64)), moments.COMPILED, 1e-4, "moments"),
        of_bfloat16("fastguide", 1.0),
        of_bfloat16("diffusers", 6.0),
        *(
            ok(small_title(name), *contender, "solvers")
            for name in targets._SOLVERS
            for contender in (("fastguide", 1e-4), ("diffusers", 1e-1))
        ),
        *(
            ok(small_title(name), *contender, "solvers")
            for name in targets._DROP_IN_STEPS
            for contender in ((solvers.DROP_IN, 1e-4), (solvers.DOUBLED, 1e-1))
        ),
        *(
            ok(targets._pipeline(name), *contender, "pipelines")
            for name in targets._PIPELINES
            for contender in ((targets._ACCELERATED, 1e-3), ("diffusers", 1e-1))
        ),
        *(
            ok(large_title(name), *contender, "solvers")
            for name in targets._LARGE_SOLVERS
            for contender in (("fastguide out=", 1e-2), ("copy_ of the same bytes", 1e-2))
        ),
    ]
