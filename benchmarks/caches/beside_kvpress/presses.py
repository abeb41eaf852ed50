"""kvpress's presses as the comparison sets them; imported by `kvpress_side.py`, in kvpress's environment."""

import torch
from kvpress import (
    AdaKVPress,
    ChunkKVPress,
    CompactorPress,
    CriticalAdaKVPress,
    CriticalKVPress,
    CURPress,
    ExpectedAttentionPress,
    FinchPress,
    KeyDiffPress,
    KnormPress,
    KVzipPress,
    LagKVPress,
    LeverageScorePress,
    ObservedAttentionPress,
    PyramidKVPress,
    QFilterPress,
    RandomPress,
    SimLayerKVPress,
    SnapKVPress,
    StreamingLLMPress,
    ThinKPress,
    TOVAPress,
)
from safetensors.torch import load_file

DELIMITER = 3  # a reserved token of SmolLM2 that no text has: finch takes it out again before the model reads


class OwnFilters(QFilterPress):
    """With the filters of a file of streamjax, whose sign is the other one, instead of downloaded ones."""

    def __init__(self, file):
        super().__init__()
        tables = load_file(file)
        self.q_filters = -torch.stack([tables[str(layer)] for layer in range(len(tables))])

    def post_init_from_model(self, model):
        pass


def finch():
    press = FinchPress()
    press.delimiter_token_id = DELIMITER
    return press


# a run's request, the share of a context that stays, and its tokens -> a press, whose ratio is set where it has one
PRESSES = {
    "streaming_llm": lambda run, share, n: StreamingLLMPress(n_sink=4),
    "snapkv": lambda run, share, n: SnapKVPress(window_size=32, kernel_size=5),
    "h2o": lambda run, share, n: ObservedAttentionPress(),
    "tova": lambda run, share, n: TOVAPress(),
    "knorm": lambda run, share, n: KnormPress(),
    "keydiff": lambda run, share, n: KeyDiffPress(),
    "lagkv": lambda run, share, n: LagKVPress(n_sink=4, lag_size=32),
    "expected_attention": lambda run, share, n: ExpectedAttentionPress(n_future_positions=512, n_sink=4),
    "chunkkv": lambda run, share, n: ChunkKVPress(SnapKVPress(window_size=30, kernel_size=1), chunk_length=10),
    "curdkv": lambda run, share, n: CURPress(num_sinks=4, local_window_size=16),
    "leverage": lambda run, share, n: LeverageScorePress(sketch_dimension=48),
    "compactor": lambda run, share, n: CompactorPress(sink_size_start=8, sink_size_end=4),
    "pyramidkv": lambda run, share, n: PyramidKVPress(window_size=32, kernel_size=5),
    "adakv": lambda run, share, n: AdaKVPress(SnapKVPress(window_size=32, kernel_size=5)),
    "criticalkv": lambda run, share, n: CriticalKVPress(SnapKVPress(window_size=32, kernel_size=5)),
    "criticaladakv": lambda run, share, n: CriticalAdaKVPress(SnapKVPress(window_size=32, kernel_size=5)),
    "qfilters": lambda run, share, n: OwnFilters(run["filters"]),
    "finch": lambda run, share, n: finch(),
    "kvzip": lambda run, share, n: KVzipPress(layerwise=True),
    "think": lambda run, share, n: ThinKPress(key_channel_compression_ratio=1 - share, window_size=32),
    # it keeps one of the newest less than it says
    "simlayerkv": lambda run, share, n: SimLayerKVPress(run["lazy"], n_recent=int(n * share) - 3, n_initial=4),
    "random": lambda run, share, n: RandomPress(seed=1),
}
NO_RATIO = ("think", "simlayerkv")


def made(run, name, share, context, prompt):
    """A method's press for a context of so many tokens and a question of so many."""
    press = PRESSES[name](run, share, context)
    if name == "finch":  # its ratio counts the question's tokens, all but the last, which stay
        window = prompt - 1
        press.compression_ratio = 1 - (int(context * share) + window + 0.5) / (context + window)
    elif name not in NO_RATIO:
        press.compression_ratio = 1 - share
    return press
