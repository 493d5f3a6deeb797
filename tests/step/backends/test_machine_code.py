"""The CUDA kernels' machine code has wide accesses, no local memory and no fast-math, for every architecture."""

from __future__ import annotations

import re
from functools import cache

import pytest

from fastguide.step.backends import native
from tests.support.machine_code import cuobjdump, instructions, resource_usage

pytestmark = pytest.mark.xdist_group("machine code")  # one process reads each library once

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
OF_GROUPS = ("sm_80", "sm_90")  # setup.py's CODE_FOR: other GPUs compile the PTX
GIVEN, DRAWN = 1, (2, 3)  # kinds of noise: csrc/kernels/arguments.h
OTHERS = 2  # extras from there on: csrc/kernels/gpu/parameters.h
MAX_REGISTERS = 128  # four blocks of 128 threads a multiprocessor, at the least


@pytest.fixture(autouse=True)
def _needs_cuda_code():
    if not native.LIBRARY.exists():
        pytest.skip("the native library is not built; fastguide info says why")
    if native.cuda_code().startswith("none"):
        pytest.skip(f"the native library holds no CUDA code: {native.cuda_code()}")


@cache
def every_kernel(architecture):
    return instructions(native.LIBRARY, architecture)


def kernels(architecture):
    """The kernels that step."""
    return {
        name: counts for name, counts in every_kernel(architecture).items() if "step_kernel" in name or "torch_" in name
    }


def of(kind, architecture):
    """The kernels of moments, of groups, of thresholds, or of the way back."""
    return {name: counts for name, counts in every_kernel(architecture).items() if name.startswith(kind)}


def variant(name):
    """Return the numbers in parameters.h's Variant<predictions, extras, noise, original, staged>."""
    values = re.search(r"Variant<(\d+), \(Extras\)(\d), \(Noise\)(\d), (\w+), (\w+)>", name).groups()
    return [v == "true" if v in ("true", "false") else int(v) for v in values]


def vectors_of(name):
    """Return how many vectors a thread may have, as parameters.h's Variant says."""
    predictions, extras, _, _, _ = variant(name)
    return 2 if predictions and extras < OTHERS and "step_kernel" in name else 1


def test_there_is_code_for_every_architecture_and_ptx_for_the_others():
    assert set(ARCHITECTURES) == set(re.findall(r"sm_\d+", cuobjdump("--list-elf", native.LIBRARY)))
    assert set(re.findall(r"sm_\d+", cuobjdump("--list-ptx", native.LIBRARY))) == {"sm_80"}
    assert native.cuda_code() == " ".join([*ARCHITECTURES, "PTX 80"])


def test_registers_and_local_memory():
    usage = resource_usage(native.LIBRARY)
    of_few = len(of("groups_kernel", "sm_90"))
    assert of_few == 1
    assert len(usage) == len(ARCHITECTURES) * (len(every_kernel("sm_90")) - of_few) + len(OF_GROUPS) * of_few
    for architecture, name, used in usage:
        assert used.registers <= MAX_REGISTERS, (architecture, name, used)
        assert used.stack == used.local == 0, (architecture, name, used)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_vectors_are_read_and_written_16_bytes_at_a_time(architecture):
    """Eight elements of float32 are two accesses a tensor. For an output, each 16-bit dtype has a store of its own."""
    seen = set()
    for name, counts in kernels(architecture).items():
        kernel = name.partition("<")[0]
        seen.add(kernel)
        assert not any(i.startswith(("LDL", "STL")) for i in counts), name
        loads = sum(n for i, n in counts.items() if re.match(r"LDG\.E(\.\w+)*\.128", i))
        stores = sum(n for i, n in counts.items() if re.match(r"STG\.E(\.\w+)*\.128", i))
        if kernel == "torch_single_kernel":
            assert loads == stores == 0
            continue
        predictions, extras, noise, original, staged = variant(name)
        vectors = vectors_of(name)
        inputs = 1 + max(predictions, 2 if predictions == 0 else 1) + 2 * (extras >= OTHERS) + (noise == GIVEN)
        assert loads >= 2 * inputs * vectors, (name, loads)  # more, where the compiler unrolls or doubles a part
        assert stores >= 4 * (1 + original + staged) * vectors, (name, stores)
    assert seen == {"step_kernel", "torch_single_kernel", "torch_vector_kernel"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_makes_weights_reads_16_bytes_at_a_time_and_adds_up_in_registers(architecture):
    """A product is one fused multiply-add, for each element of a vector, and once for a single one.

    Four terms have half vectors, as has the step in the same launch: 16 bytes of float32, and 8 of other dtypes.
    """
    (counts,) = of("moments_kernel", architecture).values()
    assert not any(i.startswith(("LDL", "STL")) for i in counts)
    loads = sum(n for i, n in counts.items() if re.match(r"LDG\.E(\.\w+)*\.128", i))
    halves = sum(n for i, n in counts.items() if re.match(r"LDG\.E(\.\w+)*\.64", i))
    assert loads >= 2 * (2 + 3) + 4 + 4  # of the step: the sample, a first and any other prediction, a noise
    assert halves >= 4 + 4
    assert sum(n for i, n in counts.items() if re.match(r"STG\.E(\.\w+)*\.128", i)) >= 4  # and what is left for later
    joined = 9 * 3 + 9 * 6 + 5 * 10 + 4 * 4
    assert sum(n for i, n in counts.items() if i.startswith("FFMA")) >= joined


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_blocks_of_a_sample_wait_for_each_other_where_there_are_clusters(architecture):
    (counts,) = of("moments_kernel", architecture).values()
    clusters = 0 if architecture == "sm_80" else 1
    assert sum(n for i, n in counts.items() if i.startswith("UCGABAR_ARV")) == clusters
    assert sum(n for i, n in counts.items() if i.startswith("UCGABAR_WAIT")) == clusters


@pytest.mark.parametrize("architecture", OF_GROUPS)
def test_what_guides_and_steps_groups_is_one_kernel_that_reads_and_writes_16_bytes_at_a_time(architecture):
    """One place reads the predictions, for all passes, or two and the sample; one the sample beside three predictions.

    Another reads what is added to it, and one place writes. Products of eight elements are added up in double, those of
    two predictions, and of a third term or sums; x0, the next sample and the history's entry are floats.
    """
    (counts,) = of("groups_kernel", architecture).values()
    assert not any(i.startswith(("LDL", "STL")) for i in counts)
    assert sum(n for i, n in counts.items() if re.match(r"LDG\.E(\.\w+)*\.128", i)) >= 2 * (3 + 1 + 1)
    assert sum(n for i, n in counts.items() if re.match(r"STG\.E(\.\w+)*\.128", i)) >= 4
    assert sum(n for i, n in counts.items() if i.startswith("DFMA")) >= 8 * (3 + 1) + 8 * (3 + 2)
    assert sum(n for i, n in counts.items() if i.startswith("FFMA")) >= 8 * (1 + 2 + 1 + 1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_finds_thresholds_reads_16_bytes_at_a_time_and_counts_in_shared_memory(architecture):
    (counts,) = of("thresholds_kernel", architecture).values()
    loads = sum(n for i, n in counts.items() if re.match(r"LDG\.E(\.\w+)*\.128", i))
    assert loads >= 2 * 4  # the sample, a first and any other prediction, a gradient
    assert sum(n for i, n in counts.items() if i.startswith("ATOMS")) >= 9  # a vector's elements, and a single one
    assert not any(i.startswith(("LDL", "STL")) for i in counts)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_way_back_is_one_kernel_that_reads_and_writes_16_bytes_at_a_time(architecture):
    (counts,) = of("backward_kernel", architecture).values()
    loads = sum(n for i, n in counts.items() if re.match(r"LDG\.E(\.\w+)*\.128", i))
    stores = sum(n for i, n in counts.items() if re.match(r"STG\.E(\.\w+)*\.128", i))
    assert loads >= 2 * 10  # the gradients that come in, the inputs, and predictions beyond the second
    assert stores >= 4  # one place writes all gradients: two accesses for float32, one for each 16-bit dtype
    assert not any(i.startswith(("LDL", "STL")) for i in counts)


def test_only_the_torch_stream_uses_approximations():
    """They are those of torch's own kernel. expf contains an ex2.approx, and corrects its result."""
    for part in cuobjdump("-ptx", native.LIBRARY).split(".entry ")[1:]:
        name = part.partition("(")[0]
        approximations = set(re.findall(r"\b\w+\.approx[.\w]*", part))
        allowed = {"ex2.approx.ftz.f32"} | ({"sin.approx.f32", "cos.approx.f32"} if "torch" in name else set())
        assert approximations <= allowed, name
        assert not re.search(r"\b(add|mul|fma|sqrt|div)\S*\.ftz", part), name
        assert not re.search(r"\b(div|sqrt)\.(full|approx)", part), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_products_and_sums_are_joined_where_the_formula_says(architecture):
    """Otherwise an element's bits would depend on its place in a vector. Exponentials and noise have their own fma.

    A kernel has the formula once for each element of a vector, and once for a single element.
    """
    plain = 0
    for name, counts in kernels(architecture).items():
        predictions, extras, noise, original, _ = variant(name)
        if noise in DRAWN or extras:
            continue
        plain += 1
        formulas = 8 * vectors_of(name) + 1
        # x0: a prediction. The next sample: x0, a prediction, noise. Guidance: a difference of predictions.
        # What an original has of the noise is one more.
        joined = formulas * (1 + 2 + (noise == GIVEN) * (1 + original) + (predictions != 1))
        assert sum(n for i, n in counts.items() if i.startswith("FFMA")) == joined, name
        assert not any(i.startswith(("HFMA2.BF16", "FFMA2", "FMUL2", "FADD2")) for i in counts), name
    assert plain == 20


def test_the_portable_stream_is_not_contracted():
    """Its products and sums are intrinsics, which no compiler may contract: 15 and 13 for two values.

    Two more products are exact, and therefore joined with their sums.
    """
    found = 0
    for part in cuobjdump("-ptx", native.LIBRARY).split(".entry ")[1:]:
        if re.search(r"Variant\w*?NS_5NoiseE3E", part.partition("(")[0]):
            found += 1
            assert len(re.findall(r"\bmul\.rn\.f32", part)) >= 4 * 15
            assert len(re.findall(r"\badd\.rn\.f32", part)) >= 4 * 13
            assert len(re.findall(r"\bfma\.rn\.f32", part)) >= 4 * 2
    assert found == 15
