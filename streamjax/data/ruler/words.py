"""What tasks are filled with: words, numbers, UUIDs, the noise of RULER, and English prose that comes with Python."""

from __future__ import annotations

import functools
import random
import re
import uuid

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

_ADJECTIVES = """
able acid aged agile alert amber ample ancient angry arid bald bare basic bitter bland blank blunt bold brave brief
bright brisk broad broken busy calm careful cheap civil clean clear clever close cold cool costly crisp cruel curly
curved daily damp dark dear deep dense direct distant dizzy double dry dull dusty eager early easy elder empty equal
exact faint fair false famous fancy fast fierce final firm fixed flat fluffy fond formal fragile frank free fresh
full funny fuzzy gentle giant glad global golden grand grave great grim handy happy hard harsh heavy hidden high
hollow honest huge humble icy ideal idle inner jolly keen kind large late lazy lean light little lively lone loose
loud low loyal lucky lunar mellow mild minor modern modest moist muddy narrow naval neat new nice noble noisy novel
odd old open outer pale past perfect plain pleasant polite poor prime private proper proud pure quick quiet rapid
rare raw ready real rich rigid ripe robust rough round royal rude rural sad safe salty sane secret severe shallow
sharp shiny short shy silent silly simple sleepy slim slow small smart smooth soft solid sour spare steady steep
stern stiff strange strict strong sturdy subtle sunny super sweet swift tall tame tasty tender thick thin tidy tight
tiny tired tough true ugly upper urban useful vague vast vital vivid warm weak weary wet whole wide wild wise witty
wooden young zany
"""
_NOUNS = """
account acorn actor advice airport album alley almond anchor angle ankle answer apple apron arch arrow artist ashes
atlas attic autumn award badge bakery balcony ballad banana banker barley barn basin basket battery beach beacon bean
bear beetle bell bench berry bicycle bird biscuit blanket blossom board boat bonfire bonnet book border bottle bowl
box branch bread breeze brick bridge broom brother brush bucket butter button cabin cable cactus cake camel camera
candle canoe canvas canyon captain carbon card cargo carpet carrot castle cattle cave cellar cereal chain chair
chalk chapel cheese cherry chest chimney church cider circle circus citizen clay cliff clinic clock cloud clover
coach coast coat cobra coffee coin collar colony comet compass copper coral corn corner cottage cotton couch country
cousin cradle crane crater crayon cream creek cricket crown crystal cup curtain cushion dagger dancer dawn deer
desert desk diary dinner doctor dolphin domain donkey door dragon drawer dream drum duck eagle editor elbow elephant
engine envelope estate evening fabric falcon family farm feather fence ferry fiddle field finger flag flame flower
flute forest fork fountain fox frame friend frog fruit furnace galaxy garage garden garlic gate ghost ginger glacier
glass glove goat goose grape gravel guitar hammer harbor harvest hat hawk helmet herb hill honey horn horse hotel
house hunter island ivory jacket jar jewel journal judge jungle kettle kitchen kite knee knife ladder lake lamp
lantern lawyer leaf leather lemon lentil letter library lily lion lizard lobster machine magnet mango map marble
market meadow melon merchant metal meteor mill mineral mirror monkey moon morning motor mountain mouse museum music
napkin needle nest nickel notebook ocean office olive onion orange orchard orchid organ otter oven owl oyster paddle
palace panther paper parade parcel parrot pasture peach peanut pebble pencil pepper piano picture pigeon pillow
pilot pine pirate planet plate plum pocket poem pony potato prairie prince pumpkin puzzle quarry queen rabbit radio
raft railway rain raisin reef ribbon rice ring river road robin rocket roof rope saddle sailor salad salmon sand
scarf school scissors shadow sheep shelf shell shoe signal silver sister sleeve smoke snail snow soap sofa spider
spoon squirrel stable statue stone storm street student sugar summer sunset table tailor teacher temple tent thread
thunder ticket tiger timber toast tomato torch tower tractor train treasure trumpet tunnel turtle umbrella uncle
valley vanilla velvet village violin volcano voyage wagon wallet walnut water weather whale wheat wheel whistle
willow window winter wizard wolf wool yard zebra
"""
_VERBS = """
accept admire adopt agree allow amuse apply argue arrange arrive attend avoid bake become begin behave believe bend
boil borrow bounce bring build carry catch choose climb collect combine compare confirm connect consider contain
continue cook create cross decide decorate deliver depend describe deserve destroy develop discover divide draw
dress drive earn enjoy enter escape examine expand expect explain explore extend follow forget forgive gather glow
grow guess happen hear hesitate hide hope hurry imagine improve include inform invent invite join jump knit know
laugh learn lend listen manage measure mend notice obey observe obtain offer paint permit persuade pour practise
praise predict prefer prepare prevent produce promise protect provide publish punish reach realise receive recognise
reduce reflect refuse remain remember remove repair repeat replace reply require rescue return reveal sail satisfy
search send shake share shout sing sleep smile solve spread stretch succeed suggest supply support surprise swim
teach travel trust understand visit wander warn wash watch whisper wonder worry write
"""
ADJECTIVES, NOUNS, VERBS = (tuple(text.split()) for text in (_ADJECTIVES, _NOUNS, _VERBS))
WORDS = tuple(sorted({*ADJECTIVES, *NOUNS, *VERBS}))


def number(draw: random.Random, digits: int = 7) -> str:
    """A number of so many digits, none of them a leading zero."""
    return str(draw.randrange(10 ** (digits - 1), 10**digits))


def name(draw: random.Random) -> str:
    """An adjective and a noun, as "quiet-river"."""
    return f"{draw.choice(ADJECTIVES)}-{draw.choice(NOUNS)}"


def unique_id(draw: random.Random) -> str:
    """A UUID of version 4."""
    return str(uuid.UUID(int=draw.getrandbits(128), version=4))


def distinct_words(draw: random.Random, count: int) -> list[str]:
    """Different words: of `WORDS` while there are enough, and else of two or three parts.

    Raises:
      ValueError: more than there are.
    """
    if count <= len(WORDS):
        return draw.sample(WORDS, count)
    parts = [ADJECTIVES, NOUNS] if count <= len(ADJECTIVES) * len(NOUNS) else [ADJECTIVES, VERBS, NOUNS]
    total = functools.reduce(lambda product, part: product * len(part), parts, 1)
    if count > total:
        raise ValueError(f"{count:,} different words are more than the {total:,} that there are")
    words = []
    for index in draw.sample(range(total), count):
        chosen = []
        for part in parts:
            index, place = divmod(index, len(part))
            chosen.append(part[place])
        words.append("-".join(chosen))
    return words


@functools.cache
def essay_words() -> tuple[str, ...]:
    """Words of English prose: what `pydoc_data.topics` says about Python, without its tables, code and grammar.

    About 45,000 words; Python versions differ in them. RULER has essays of Paul Graham here, which are not free.
    """
    from pydoc_data.topics import topics  # half a megabyte of text

    return tuple(word for topic in sorted(topics) for part in _prose(topics[topic]) for word in part.split())


def _prose(text: str) -> list[str]:
    """The paragraphs of a page that are sentences: they begin at the margin with a letter, and end with a full stop."""
    paragraphs = re.split(r"\n\s*\n", text)
    return [p for p in paragraphs if re.match(r"[A-Z]", p) and p.rstrip().endswith(".") and "::=" not in p]


def essay(words: int) -> list[str]:
    """The first so many words of the essays, again from the beginning behind their end, as sentences."""
    source = essay_words()
    repeats = -(-words // len(source))
    text = " ".join((source * repeats)[:words])
    return re.split(r"(?<=[.!?])\s+(?=[A-Z\"])", text)
