"""Machine code of GPU kernels as the disassembler prints it: which loops there are, and what they cost."""

import pytest

from benchmarks import aot
from benchmarks.kernels.gpu import machine_code
from benchmarks.kernels.gpu.machine_code import Loop, loops

SASS = """
	.headerflags	@"EF_CUDA_SM90"
//--------------------- .text.flash_forward --------------------------
	.section	.text.flash_forward,"ax",@progbits
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_1:
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, !UPT ;
        /*0030*/              @!P1 MUFU.EX2 R3, R3 ;
        /*0040*/                   FFMA R4, R4, R5, R6 ;
        /*0050*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0060*/                   HGMMA.64x64x16.F32.BF16 R24, R8, gdesc[UR4], R24 ;
        /*0070*/                   HGMMA.64x64x16.F32.BF16 R24, R12, gdesc[UR8], R24, gsb0 ;
        /*0080*/              @!P2 BRA `(.L_x_2) ;
        /*0090*/               @P3 BRA `(.L_x_0) ;
.L_x_3:
        /*00a0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR6], R4 ;
        /*00b0*/              @!P0 BRA `(.L_x_3) ;
        /*00c0*/                   BRA `(.L_x_1) ;
        /*00d0*/               @P0 BRA `(.L_x_4) ;
.L_x_4:
        /*00e0*/                   EXIT ;
	.section	.text.page_scores,"ax",@progbits
.L_x_5:
        /*0000*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0010*/               @P0 BRA `(.L_x_5) ;
"""


def test_counts_the_inner_loops_that_multiply():
    """Not the one around them, nor waiting, nor the way back from a wait that stands apart."""
    assert loops(SASS) == {"flash_forward": [Loop(4, 64, 8), Loop(3, 64, 0)], "page_scores": []}


def test_says_nothing_of_nothing():
    assert loops("") == {}


def test_reads_dumps_of_xla_and_of_mosaic(tmp_path, monkeypatch):
    """Registers and loops by the kernel's name, also where Mosaic has named the entry; other programs are left out."""
    launch = "flash_forward grid: [1,1,1] threads: [256, 1, 1] shared_memory: 99 bytes\n"
    (tmp_path / "a.thunk_sequence.txt").write_text(launch)
    for name in ("flash_forward", "flash_forward_hopper_mosaic_gpu_kernel", "loop_add_fusion"):
        (tmp_path / f"{name}.ptx").write_text(f".visible .entry {name}(\n")
    asked = []

    def run(program, *arguments):
        asked.append(arguments)
        if program == "ptxas":
            name = arguments[2].rpartition("/")[2].removesuffix(".ptx")
            said = f"Function properties for {name}\n 8 bytes spill stores, 4 bytes spill loads\n Used 99 registers"
            return machine_code.subprocess.CompletedProcess([], 0, stderr=said)
        name = arguments[1].rpartition("/")[2].removesuffix(".cubin")
        return machine_code.subprocess.CompletedProcess([], 0, stdout=SASS.replace("flash_forward", name))

    monkeypatch.setattr(machine_code, "tool", lambda name: name)
    monkeypatch.setattr(machine_code, "_run", run)
    found = machine_code.figures(tmp_path)
    every = {"registers": 99, "spills": 12, "loop": {"instructions": 3, "tensor": 64, "special": 0}}
    assert found == {
        "flash_forward": {"threads": 256, "shared": 99, **every},
        "flash_forward_hopper": every,
    }
    assert len(asked) == 4


@pytest.mark.skipif(not aot.available("cuda"), reason="no compiler for GPUs: `make aot-compilers` installs it")
def test_the_tools_are_there():
    assert all(machine_code.tool(name) for name in ("ptxas", "nvdisasm"))
    assert len(machine_code.versions()) == 2
