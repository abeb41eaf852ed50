"""One pool for all heads, in float64 numpy: the lists of `scored.py`, cut to sizes that the heads' scores decide."""

from tests.oracles import scored


class Stream(scored.Stream):
    """`floor`, in thousandths: the share of `size` that every head is sure of."""

    def __init__(self, rule: scored.Rule, floor: int):
        super().__init__(rule)
        self.floor = floor

    def choose(self) -> None:
        rule, ranked, every = self.rule, [], []
        for head, kept in enumerate(self.kept):
            worth = rule.score(self, head, kept)
            mine = sorted(((float(w), e[2], head, e) for w, e in zip(worth, kept, strict=True)), key=lambda x: x[:2])
            ranked.append(mine[::-1])
            every += mine
        if len(every) <= rule.heads * rule.size:
            return
        every.sort(key=lambda x: (x[0], x[1], x[2]))
        best = every[-rule.heads * rule.size :]
        parts = [self.floor * rule.size + (1000 - self.floor) * sum(x[2] == h for x in best) for h in range(rule.heads)]
        sizes = [p // 1000 for p in parts]
        left = sorted(range(rule.heads), key=lambda h: (-(parts[h] % 1000), h))
        for head in left[: rule.heads * rule.size - sum(sizes)]:
            sizes[head] += 1
        for head, size in enumerate(sizes):
            self.kept[head] = sorted((x[3] for x in ranked[head][:size]), key=lambda e: e[2])
