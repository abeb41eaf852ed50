"""ShadowKV (Sun et al., arXiv 2410.21465): keys of low rank, and the pages of them that a query wants.

The published rule: at the end of a prompt its keys before rotation, of all heads together, are decomposed to rank 160,
and values go to the host's memory. Pages of 8 tokens have their mean rotated key as a landmark; the 48 with a key that
is least like it, by cosine, stay on the device as they are, and so do the newest tokens and all that are generated. A
token reads those, and the 256 pages whose landmarks it weighs most: their keys are rebuilt and rotated, their values
fetched. `sj.compact(model, state, sj.kv.preset("shadow_kv"))` does so with a prompt. Here streams do too: the basis is
of the first `group` tokens, and tokens wait in full until their group is full. The paper's prompt reads everything;
here `block` neighbouring queries of a chunk read the pages that one of them wants most, as many as a single token
reads: at 8,192 tokens a quarter. With `block=1` each chooses as a single token does. Landmarks of all pages are kept.
Values lie on the device, or with `placement="host"` in the host's memory, those of outliers too; the newest `group`
tokens' lie on the device as well.
"""

from streamjax.field_checks import Count, Fraction, Size
from streamjax.kv.cascade import Cascade
from streamjax.kv.channels.shadow import Shadow
from streamjax.kv.presets.registry import register
from streamjax.kv.tiers.pages import Placement
from streamjax.kv.tiers.window import Window


@register(paper="ShadowKV: KV Cache in Shadows for High-Throughput Long-Context LLM Inference, arXiv 2410.21465")
def shadow_kv(
    keys: Fraction = 0.15625,
    window: Size = 32,
    page: Size = 8,
    top_k: Size = 256,
    outliers: Count = 48,
    group: Size = 512,
    capacity: Size = 65536,
    placement: Placement = "device",
    block: Size = 32,
) -> Cascade:
    """Keep every token up to `capacity`, keys in a basis; read the `top_k` pages that fit best, and odd ones whole."""
    shadow = Shadow(
        capacity, keys, group=group, page=page, top_k=top_k, outliers=outliers, placement=placement, block=block
    )
    return Cascade(Window(window), shadow)
