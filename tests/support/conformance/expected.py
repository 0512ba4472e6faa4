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
        "torch module_db",
        r"(Lazy)?InstanceNorm[23]d / memory format / .*",
        "channels-last memory stays so, as in batch norm; torch's output is contiguous",
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
    ByDesign("torch module_db", r"\w+ / functional_call / .*", "_skipped is a buffer"),
    ByDesign("torch module_db", r"\w+ / meta, to_empty, assign / .*", "_skipped is a buffer"),
    ByDesign("torch module_db", r"\w+ / device and dtype / not_.*", "_skipped is on the CPU"),
    ByDesign("torch module_db", r"\w+ / refused / 10, eps=0.0", "eps=0 trains"),
    ByDesign("torch op_db", r"GroupNorm / all valid / .*\(0, .*", "an empty batch with a mask"),
    ByDesign("torch test_nn, lazy", r"BatchNorm / count None / .*", "num_batches_tracked=None"),
    ByDesign("torch test_nn, lazy", r"BatchNorm / wider input / .*", "float64 into float32"),
    ByDesign("torch test_nn, lazy", r"InstanceNorm / one place / 2D", "zeros, channels last"),
    ByDesign("torch test_nn, lazy", r"InstanceNorm / far from zero.* / 2D", "channels last"),
    ByDesign("torch test_nn, lazy", r"LazyBatchNorm / (no affine|known).*", "0 channels"),
    ByDesign("torch systems", r".* / make_fx, real", "a value is looked at"),
    ByDesign("torch systems", r".* / prune, (l1|mask)", "two parameters taken for none moved"),
    ByDesign("torch systems", r".* / load by assignment", "_skipped is a buffer"),
    ByDesign("torch systems", r".* / training deleted", "KeyError"),
    ByDesign("torch systems", r".* / vmap ensemble, .*", "values are looked at"),
    ByDesign("torch systems", r".* / replace_all_batch_norm_modules_", "asks for statistics"),
    ByDesign("torch systems", r"BatchNorm2d \(renorm\) / checkpoint.*", "corrected by later ones"),
    ByDesign("torch systems", r"BatchNorm2d \(act\) / fuse_conv_bn_eval", "drops act"),
    ByDesign("torch systems", r".* / convert_sync_batchnorm", "drops act"),
    ByDesign("torch systems", r"BatchNorm2d \(commit\) / swa update_bn", "forgets"),
    ByDesign("torch systems", r"(InstanceNorm2d|RMSNorm) / fx.symbolic_trace", "looks at sizes"),
    ByDesign("fvcore", r".*commit at the step", "no forward writes"),
)
