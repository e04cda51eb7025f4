"""Reading the TPU compiler's schedules: by hand on small ones, and with the compiler itself where
it is installed.
"""

import jax
import jax.numpy as jnp
import pytest

from hire.lab.tpu import bundle_parser, compiler, multichip, programs

BUNDLES = """
     0   :  { %5 = vsyncpa [#allocation9], 0  ;;  %7 = dma.hbm_to_vmem /*hbm=*/%s1, /*size_in_granules=*/100, /*vmem=*/%s2 }
   0x1   :  { %s9 = smov 0 } /* Start region 3 */
   0x2 LB: > { %s8 = sphi %s9, %s10 } /* Start region 4 */
   0x3   : > { %s6 = shalt.err /* BoundsCheck for %8 = dma.hbm_to_vmem /*hbm=*/%s1, /*size_in_granules=*/10, /*vmem=*/%s2 */ }
   0x4   : > { %8 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s1, /*size_in_granules=*/10, /*vmem=*/%s2  ;;  %9 = dma.vmem_to_smem
 /*vmem=*/%s2, /*size_in_granules=*/7, /*smem=*/%s3 }
   0x5 LB: >> { %v1 = vadd.f32 %v2, %v3 } /* Start region 6 */
   0x6   : >> { %p2_p1 = scmp.ge.s32.totalorder (%p1), %s30_s1, LIMIT /* loop exit test */ }
   0x7   : >> { %11 = sbr.rel (!%p2_p1) target = $region6 }
   0x8   : > { %p1_p0 = scmp.ge.s32.totalorder %s10_s2, 3 /* loop exit test */ }
   0x9   :  { %12 = sbr.rel (!%p1_p0) target = $region4 }
   0xa   :  {}
"""


def test_bundles_are_counted_as_often_as_they_run():
    # Inner loop 0x5 to 0x7 five times; what is issued while it jumps, 0x8 to 0xa, counts with it.
    # Outer 0x2 to 0xa three times.
    cycles, moved, holes = bundle_parser.schedule(BUNDLES.replace("LIMIT", "5"))
    assert cycles == 2 + 3 * (3 + 5 * 6)
    assert moved == 32 * (100 + 3 * 10) and holes == ()
    cycles, moved, holes = bundle_parser.schedule(BUNDLES.replace("LIMIT", "%s77"))
    assert cycles == 2 + 3 * (3 + 6) and holes == ("a loop of 2 bundles counted once",)


HLO = """
HloModule jit_f

%body (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p = (s32[], f32[8,128]{1,0:T(8,128)S(1)}) parameter(0)
  %inner = f32[8,128]{1,0:T(8,128)S(1)} fusion(%p), kind=kLoop, calls=%fused
}

ENTRY %main (a: bf16[1000,128], b: f32[64]) -> f32[8,128] {
  %a = bf16[1000,128]{1,0:T(8,128)(2,1)} parameter(0)
  %copy-start = (bf16[1000,128]{1,0:T(8,128)(2,1)S(1)}, bf16[1000,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%a)
  %busy = f32[8,128]{1,0:T(8,128)S(1)} fusion(%b), kind=kLoop, calls=%fused
  %copy-done = bf16[1000,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %uneven = f32[8,128]{1,0:T(8,128)S(1)} fusion(%a, %copy-done), kind=kOutput, calls=%fused
  %silent = f32[8,128]{1,0:T(8,128)S(1)} fusion(%a), kind=kLoop, calls=%fused
  %loop = (s32[], f32[8,128]{1,0:T(8,128)}) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  %gathered = f32[32,128]{1,0:T(8,128)} all-gather(%uneven), channel_id=1, dimensions={0}
  %strange = f32[8,128]{1,0:T(8,128)} rng(%uneven)
  ROOT %out = f32[8,128]{1,0:T(8,128)} bitcast(%gathered)
}
"""


def test_slices_by_hand():
    assert [bundle_parser.network(bundle_parser.sides(f"v5e:{slice}")) for slice in ("1x1", "2x2", "4x4", "8x8", "16x16")] == [
        (1, 0), (2, 2), (2, 6), (2, 14), (4, 16)
    ]  # fmt: skip
    assert bundle_parser.bytes_sent(HLO) == 32 * 128 * 4
    started = bundle_parser.Instruction(
        "a", "(f32[8,128]{1,0}, f32[32,128]{1,0})", "all-gather-start", ""
    )
    assert bundle_parser.collected(started) == 32 * 128 * 4


def test_an_older_compiler_names_the_bundle_that_a_loop_begins_with():
    older = BUNDLES.replace("target = $region6", "target bundleno = 5 (0x5), region = 6")
    older = older.replace("target = $region4", "target bundleno = 2 (0x2), region = 4")
    assert older != BUNDLES and bundle_parser.schedule(
        older.replace("LIMIT", "5")
    ) == bundle_parser.schedule(BUNDLES.replace("LIMIT", "5"))


def test_operations_that_are_alike_share_a_schedule():
    """One schedule is kept of `first` and `second`; `other`, of another shape, has none; a scalar
    costs nothing.
    """
    body = "%fused.{0} (p: f32[64,128]) -> f32[8,128] {{\n  %q.{0} = f32[8,128]{{1,0}} slice(%p.{0}), slice={{0:8}}\n}}\n\n"
    rows = [
        "  %a = f32[64,128]{1,0:T(8,128)} parameter(0)",
        "  %first = f32[8,128]{1,0:T(8,128)S(1)} fusion(%a), kind=kLoop, calls=%fused.1",
        "  %second = f32[8,128]{1,0:T(8,128)S(1)} fusion(%a), kind=kLoop, calls=%fused.2",
        "  %other = f32[16,128]{1,0:T(8,128)S(1)} fusion(%a), kind=kLoop, calls=%fused.2",
        "  %scalar = f32[] add(%x, %y)",
    ]
    hlo = (
        body.format(1)
        + body.format(2)
        + "ENTRY %main (a: f32[64,128]) -> f32[8,128] {\n"
        + "\n".join(rows)
        + "\n}\n"
    )
    known = {"first": (150.0, 4096.0, ()), "TLP": (30.0, 0.0, ())}
    result = {each.name: each for each in bundle_parser.operations(hlo, known)}
    assert [result[name].cycles for name in ("control", "first", "second", "other")] == [
        30,
        150,
        150,
        0,
    ]
    assert (
        result["second"].nbytes == 4096
        and result["other"].unparsed == ("no schedule of it",)
        and "scalar" not in result
    )


def test_operations_by_hand():
    unknown = ("a transfer hbm_to_vmem of unknown size",)
    known = {
        "inner": (150.0, 0.0, ()),
        "busy": (300.0, 0.0, ()),
        "uneven": (30.0, 64.0, unknown),
        "silent": (9.0, 64.0, ()),
    }
    result = {each.name: each for each in bundle_parser.operations(HLO, known)}
    assert result["inner"].times == 7 and result["inner"].cycles == 7 * 150
    assert result["inner"].seconds == pytest.approx(7 * 150 / 1.5e9)
    # The prefetch of 256,000 bytes takes 0.3126 us, of which 0.2 us pass while `busy` computes.
    assert result["copy-start"].nbytes == 256_000
    assert result["copy-start"].wait_seconds == pytest.approx(256_000 / 819e9 - 0.2e-6)
    assert result["uneven"].nbytes == 256_000  # its operand in HBM, not the copy in VMEM
    assert result["uneven"].seconds == pytest.approx(256_000 / 819e9 + bundle_parser.LATENCY)
    assert result["silent"].nbytes == 256_000  # which its schedule does not show
    assert result["silent"].unparsed == ("fewer bytes in its schedule than it must move",)
    gathered = result[
        "gathered"
    ]  # three quarters of it come from the other chips of a 2x2, over two links and two hops
    assert gathered.kind == "collective" and gathered.nbytes == 3 / 4 * 32 * 128 * 4
    assert gathered.seconds == pytest.approx(
        gathered.nbytes / (2 * bundle_parser.LINK) + 2 * bundle_parser.HOP
    )
    assert result["strange"].unparsed == ("no schedule of it",)
    assert "out" not in result and "a" not in result


def installed():
    try:
        return bool(compiler.compiler_version())
    except ModuleNotFoundError:
        return False


needs_compiler = pytest.mark.skipif(not installed(), reason="libtpu is not installed")


def dense(x, rows):
    return jax.lax.top_k(jnp.matmul(x, rows.T, preferred_element_type=jnp.float32), 32)


def sized(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


@needs_compiler
@pytest.mark.parametrize("batch", [1, 8])
def test_no_estimate_is_below_its_bytes(batch):
    result = compiler.estimate(dense, sized(batch, 1024), sized(32768, 1024))
    floor = 2 * 32768 * 1024 / bundle_parser.BANDWIDTH
    assert floor < result["transfer_seconds"] <= result["seconds"] < 6 * floor
    assert result["memory"]["argument"] >= 2 * 32768 * 1024


@needs_compiler
def test_what_the_compiler_refuses_is_one_line():
    with pytest.raises(RuntimeError, match="v5e:2x2.*(HBM|EXHAUSTED)"):
        compiler.estimate(dense, sized(8, 2048), sized(2**24, 2048))
    with pytest.raises(RuntimeError, match="v5e:3x9"):
        compiler.estimate(dense, sized(8, 128), sized(1024, 128), topology="v5e:3x9")
    with pytest.raises(RuntimeError, match="0.1 s"):
        compiler.estimate(dense, sized(8, 128), sized(1024, 128), limit=0.1)


def test_without_the_compiler_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(compiler.importlib.metadata, "distributions", lambda **_: [])
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'hire\[tpu-compiler\]'"):
        compiler.compiler_version()


@needs_compiler
@pytest.mark.parametrize("name", programs.KERNEL_TARGETS)
def test_every_kernel_compiles_for_a_v5e_and_stays_near_its_bytes(name):
    program = programs.kernels()[name]
    result = compiler.estimate(program.function, program.weights, program.x)
    kernel_operation = max(result["operations"], key=lambda each: each["seconds"])
    assert kernel_operation["kind"] == "custom-call" and not result["unparsed"]
    floor = program.reads / bundle_parser.BANDWIDTH
    assert floor < kernel_operation["seconds"] < programs.KERNEL_TARGETS[name] * floor


@needs_compiler
def test_the_public_classes_take_the_kernels_on_a_tpu_alone():
    """By default the softmax is compiled for a TPU with both kernels; with implementation="xla",
    with none.
    """
    kinds = {}
    for implementation in ("auto", "xla"):
        program = programs.hire_softmax(
            1024, 8, "LR int8", implementation, vocabulary=65536, candidates=256
        )
        result = compiler.estimate(program.function, program.weights, program.x)
        kinds[implementation] = [each["kind"] for each in result["operations"]].count("custom-call")
    assert kinds == {"auto": 2, "xla": 0}


def test_programs_run_where_they_are_and_read_what_they_say():
    softmax = programs.hire_softmax(256, 2, "LR int8", "xla", vocabulary=4096, candidates=64)
    assert softmax.reads == 4096 * 128 + 4 * 4096 + 128 * 256 + 4 * 128 + 2 * 64 * 256 * 2
    ffn = programs.hire_ffn(256, 2, "xla", 0.1, 0.2, neurons=512)
    assert ffn.reads == 512 * 64 + 4 * 512 + 64 * 256 + 4 * 64 + 2 * (12 + 6) * 8 * 256 * 2
    for program in (softmax, ffn, programs.dense_ffn(256, 2, "dense x @ W.T", neurons=512)):
        assert len(programs.time_program(program, loops=2, repeats=2)) == 2


@needs_compiler
def test_da_top_k_sends_the_same_few_bytes_for_any_vocabulary(monkeypatch):
    monkeypatch.setattr(multichip, "WIDTH", 256)

    def bytes_sent(name: str, num_rows: int) -> int:
        monkeypatch.setattr(multichip, "VOCABULARY", num_rows)
        program = multichip.program(name, "v5e:2x2", 8)
        return compiler.estimate(program.function, program.weights, program.x, specs=program.specs)[
            "bytes_sent"
        ]

    # Texts, k of each device, bytes, chips.
    assert bytes_sent("HiRE DA", 8192) == bytes_sent("HiRE DA", 16384) == 8 * 16 * 8 * 4
    for num_rows in (8192, 16384):
        assert bytes_sent("dense gathered", num_rows) == 8 * num_rows * 4
