"""What other people's suites ask of the layers that they are not meant to be, and why."""

from __future__ import annotations

from conformance.cases import ByDesign

BY_DESIGN = (
    ByDesign(
        "torch module_db",
        r"RMSNorm / (repr|state dict) / 3d_.*",
        "RMSNorm has a weight for each channel of (N, C, *S); torch's one for each place, too",
    ),
    ByDesign(
        "torch systems",
        r"BatchNorm2d \(ghost\) / swa update_bn",
        "with ghost batches the statistics are those of the groups, by which it normalizes",
    ),
    ByDesign(
        "torch systems",
        r".* / jit.script",
        "TorchScript has no form of the options; export, or convert to torch's layers first",
    ),
    ByDesign(
        "torch systems",
        r".* / fuse_modules",
        "it goes by exact types; convert to torch's layers first, or fold",
    ),
    ByDesign(
        "torch systems",
        r"BatchNorm2d \(commit\) / compile, (training|mask|40,000 .*)",
        "which forwards a gradient reaches no graph can hold; compile with fullgraph=False",
    ),
    ByDesign(
        "detectron2",
        r"BatchNorm, sync / ranks weigh the same / 2 ranks",
        "each value weighs the same, as in one process, not each rank",
    ),
    ByDesign(
        "Keras",
        r"renorm / statistics of its own",
        "renorm corrects by the running statistics, as in Ioffe 2017, algorithm 1",
    ),
)

# Faults that are known and not mended yet, of the suites' quick part; the test says which are.
OPEN: tuple[ByDesign, ...] = (
    ByDesign("torch systems", r".* \(frozen\) / convert_sync_batchnorm", "torch's TypeError"),
)
