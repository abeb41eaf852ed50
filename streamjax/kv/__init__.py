"""KV caches: tiers, cascades of tiers, and published systems as presets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamjax.kv.budgets.ada_kv import OverHeads
from streamjax.kv.budgets.budget import Budget
from streamjax.kv.budgets.budgeted import Budgeted
from streamjax.kv.budgets.cake import Preferences
from streamjax.kv.budgets.calibration import Calibration
from streamjax.kv.budgets.d2o import Density
from streamjax.kv.budgets.prefix_kv import Prefixes
from streamjax.kv.budgets.pyramid import Pyramid
from streamjax.kv.budgets.uniform import Uniform
from streamjax.kv.budgets.zipvl import Important
from streamjax.kv.cache import Cache
from streamjax.kv.cascade import Cascade
from streamjax.kv.channels.grouped_layers import GroupedLayers
from streamjax.kv.channels.low_rank import Factors, LowRank
from streamjax.kv.channels.paired_layers import PairedLayers
from streamjax.kv.channels.pruned import PrunedKeys
from streamjax.kv.channels.shadow import Shadow
from streamjax.kv.codecs.block_floats import BlockFloats
from streamjax.kv.codecs.codec import Codec, bytes_per_token
from streamjax.kv.codecs.fireq import FireQ
from streamjax.kv.codecs.fp8 import FP8
from streamjax.kv.codecs.gear import Gear
from streamjax.kv.codecs.hadamard import Hadamard
from streamjax.kv.codecs.integers import Int
from streamjax.kv.codecs.measured.coupled import CQ, Codebooks
from streamjax.kv.codecs.mixed import Mixed
from streamjax.kv.head_groups import HeadGroups
from streamjax.kv.layer_caches.current_chunk import CurrentChunk
from streamjax.kv.layer_caches.slots_of import SlotsOf
from streamjax.kv.layouts.across_layers import AcrossLayers
from streamjax.kv.merging.cam import IntoFollowing
from streamjax.kv.merging.d2o import NearestAbove
from streamjax.kv.merging.elastic_cache import Anchors
from streamjax.kv.merging.ems import ZeroClass
from streamjax.kv.merging.kvmerger import Gaussian
from streamjax.kv.merging.lococo import Convolved, Kernels
from streamjax.kv.merging.merge import Joining, Merge, Side
from streamjax.kv.pages.boundaries import EndTokens, KeyChange
from streamjax.kv.pages.indexes import BestKey, BlendedBounds, Index, Mean, Middle, MinMax, Representative
from streamjax.kv.pages.selection import Coarse
from streamjax.kv.presets import Preset, parse_preset, preset, presets
from streamjax.kv.query import KVSpec, KVTokens, Query
from streamjax.kv.scores.chunkkv import ChunkKV
from streamjax.kv.scores.criticalkv import CriticalKV
from streamjax.kv.scores.cur import CUR
from streamjax.kv.scores.expected_attention import ExpectedAttention
from streamjax.kv.scores.finch import Finch
from streamjax.kv.scores.h2o import H2O
from streamjax.kv.scores.keydiff import KeyDiff
from streamjax.kv.scores.knorm import KNorm
from streamjax.kv.scores.kvzip import KVzip
from streamjax.kv.scores.lagkv import LagKV
from streamjax.kv.scores.leverage import Leverage
from streamjax.kv.scores.mean_attention import MeanAttention
from streamjax.kv.scores.query_filters import QFilters
from streamjax.kv.scores.random_choice import RandomChoice
from streamjax.kv.scores.retaining import Retaining, RetainingHeads
from streamjax.kv.scores.scissorhands import Scissorhands
from streamjax.kv.scores.score import Held, Score
from streamjax.kv.scores.snapkv import SnapKV
from streamjax.kv.scores.tova import TOVA
from streamjax.kv.scores.windowkv import WindowKV
from streamjax.kv.selective.lines import Lines
from streamjax.kv.selective.noted import Noted
from streamjax.kv.selective.static_eviction import StaticEviction
from streamjax.kv.shared_front import SharedFront
from streamjax.kv.tier import Tier
from streamjax.kv.tiers.bank import Bank
from streamjax.kv.tiers.clusters import Clusters
from streamjax.kv.tiers.compensation import Compensation
from streamjax.kv.tiers.content_pages import ContentPages
from streamjax.kv.tiers.full import Full
from streamjax.kv.tiers.landmark_memory import ChunkMemory
from streamjax.kv.tiers.pages import Pages
from streamjax.kv.tiers.parallel import Parallel
from streamjax.kv.tiers.pooled import Pooled
from streamjax.kv.tiers.scored import Scored
from streamjax.kv.tiers.sink import Sink
from streamjax.kv.tiers.window import Window
from streamjax.lazy_names import lazy_names

if TYPE_CHECKING:
    from streamjax.evaluation.cache_sizes import describe
    from streamjax.evaluation.equal_bytes import sized

# What a cache takes depends on a model: it stands above models, and has its name among caches, where one looks for it.
_HOMES = {"streamjax.evaluation.cache_sizes": ("describe",), "streamjax.evaluation.equal_bytes": ("sized",)}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)

__all__ = [
    "CQ",
    "CUR",
    "FP8",
    "H2O",
    "TOVA",
    "AcrossLayers",
    "Anchors",
    "Bank",
    "BestKey",
    "BlendedBounds",
    "BlockFloats",
    "Budget",
    "Budgeted",
    "Cache",
    "Calibration",
    "Cascade",
    "ChunkKV",
    "ChunkMemory",
    "Clusters",
    "Coarse",
    "Codebooks",
    "Codec",
    "Compensation",
    "ContentPages",
    "Convolved",
    "CriticalKV",
    "CurrentChunk",
    "Density",
    "EndTokens",
    "ExpectedAttention",
    "Factors",
    "Finch",
    "FireQ",
    "Full",
    "Gaussian",
    "Gear",
    "GroupedLayers",
    "Hadamard",
    "HeadGroups",
    "Held",
    "Important",
    "Index",
    "Int",
    "IntoFollowing",
    "Joining",
    "KNorm",
    "KVSpec",
    "KVTokens",
    "KVzip",
    "Kernels",
    "KeyChange",
    "KeyDiff",
    "LagKV",
    "Leverage",
    "Lines",
    "LowRank",
    "Mean",
    "MeanAttention",
    "Merge",
    "Middle",
    "MinMax",
    "Mixed",
    "NearestAbove",
    "Noted",
    "OverHeads",
    "Pages",
    "PairedLayers",
    "Parallel",
    "Pooled",
    "Preferences",
    "Prefixes",
    "Preset",
    "PrunedKeys",
    "Pyramid",
    "QFilters",
    "Query",
    "RandomChoice",
    "Representative",
    "Retaining",
    "RetainingHeads",
    "Scissorhands",
    "Score",
    "Scored",
    "Shadow",
    "SharedFront",
    "Side",
    "Sink",
    "SlotsOf",
    "SnapKV",
    "StaticEviction",
    "Tier",
    "Uniform",
    "Window",
    "WindowKV",
    "ZeroClass",
    "bytes_per_token",
    "describe",
    "parse_preset",
    "preset",
    "presets",
    "sized",
]
