"""The English words that the rule-based director understands: tables of patterns, and what each stands for.

Patterns are regular expressions for lower-case text, matched at word boundaries. A word that is as often something else
("warm light", "a kind of", "content") is left out: the user's sentence reaches the model verbatim anyway, and a wrong
reading does more harm than none.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Emotion:
    """words: pattern. arousal: 0..1, after the circumplex (Russell 1980). opposite: terms for the negative prompt."""

    words: str
    arousal: float
    opposite: tuple[str, ...]


EMOTIONS = {
    "happy": Emotion(
        words=r"happ(?:y|ily|iness)|joy(?:ful|fully|ous)?|cheerful(?:ly)?|glad(?:ly)?|delight(?:ed)?|pleased|merr(?:y|ily)"
        r"|smil(?:e|es|ing)|grin(?:s|ning)?|laugh(?:s|ing|ter)?|amused|playful(?:ly)?|friendly",
        arousal=0.65,
        opposite=("sad", "gloomy", "crying"),
    ),
    "excited": Emotion(
        words=r"excit(?:ed|edly|ement)|enthusias(?:m|tic|tically)|thrilled|ecstatic(?:ally)?|elated|overjoyed"
        r"|passionate(?:ly)?|energetic(?:ally)?|eager(?:ly)?",
        arousal=0.9,
        opposite=("bored", "listless", "tired"),
    ),
    "angry": Emotion(
        words=r"ang(?:er|ry|rily)|furious(?:ly)?|rage|enraged|annoyed|irritated|outraged|indignant(?:ly)?|resentful"
        r"|hostile|aggressive(?:ly)?|mad at",
        arousal=0.85,
        opposite=("smiling", "friendly", "calm"),
    ),
    "sad": Emotion(
        words=r"sad(?:ly|ness)?|unhappy|unhappily|sorrow(?:ful|fully)?|mournful(?:ly)?|melanchol(?:y|ic)|depressed|gloomy"
        r"|miserable|grie(?:f|ving)|cr(?:y|ies|ying)|weep(?:s|ing)?|tearful(?:ly)?|heartbroken|disappointed",
        arousal=0.3,
        opposite=("happy", "smiling", "laughing"),
    ),
    "afraid": Emotion(
        words=r"afraid|fear(?:ful|fully)?|scared|frightened|terrified|anxious(?:ly)?|nervous(?:ly)?|worried|panick(?:ed|ing)",
        arousal=0.75,
        opposite=("calm", "confident", "relaxed"),
    ),
    "surprised": Emotion(
        words=r"surpris(?:e|ed|edly)|astonish(?:ed|ment)|amaze(?:d|ment)|shocked|startled|stunned",
        arousal=0.8,
        opposite=("bored", "indifferent"),
    ),
    "disgusted": Emotion(
        words=r"disgust(?:ed|edly)?|revolted|repulsed|contempt(?:uous|uously)?|scornful(?:ly)?",
        arousal=0.6,
        opposite=("pleased", "delighted"),
    ),
    "confused": Emotion(
        words=r"confus(?:ed|edly|ion)|puzzled|perplexed|bewildered|baffled|uncertain|doubtful(?:ly)?|unsure",
        arousal=0.5,
        opposite=("confident", "certain"),
    ),
    "calm": Emotion(
        words=r"calm(?:ly|ness)?|relaxed|peaceful(?:ly)?|seren(?:e|ely|ity)|tranquil|soothing(?:ly)?|at ease",
        arousal=0.25,
        opposite=("agitated", "tense", "excited"),
    ),
    "serious": Emotion(
        words=r"serious(?:ly)?|frown(?:s|ing)?|solemn(?:ly)?|stern(?:ly)?|earnest(?:ly)?|gravely|thoughtful(?:ly)?|pensive(?:ly)?",
        arousal=0.45,
        opposite=("laughing", "grinning", "playful"),
    ),
    "tender": Emotion(
        words=r"tender(?:ly|ness)?|loving(?:ly)?|affection(?:ate|ately)?|compassion(?:ate|ately)?|warmly|kindly",
        arousal=0.4,
        opposite=("cold", "hostile", "angry"),
    ),
    "confident": Emotion(
        words=r"confiden(?:t|tly|ce)|proud(?:ly)?|pride|determined|self-assured",
        arousal=0.6,
        opposite=("nervous", "unsure", "timid"),
    ),
    "tired": Emotion(
        words=r"tired(?:ly)?|bored|boredom|sleepy|wear(?:y|ily)|exhausted|listless(?:ly)?",
        arousal=0.15,
        opposite=("excited", "energetic", "wide awake"),
    ),
    "neutral": Emotion(
        words=r"neutral(?:ly)?|expressionless|emotionless|deadpan",
        arousal=0.5,
        opposite=("grimacing", "exaggerated expression"),
    ),
    # What a voice alone can tell: that the speaker is stirred, not whether in joy or anger. Not looked for in text.
    "lively": Emotion(words=r"(?!)", arousal=0.5, opposite=("bored", "listless")),
}

INTENSITY = {
    1.5: r"very|extremely|really|so|deeply|highly|utterly|truly|intensely|absolutely|completely|visibly|wildly",
    0.5: r"slight(?:ly)?|a little|a bit|a touch|a hint|somewhat|mild(?:ly)?|faint(?:ly)?|gentl[ey]|subtl[ey]|less",
}

NEGATIONS = r"not|no|never|without|neither|nor|cannot|avoid(?:s|ing)?|stop(?:s|ped)?|hardly|\w+n't|dont|doesnt|isnt"
TURNS = r"but|instead|rather|and|only|just|while"  # where the reach of a negation ends

_HIS = r"(?:(?:his|her|their|its|the|your|my|a|an|one|both|some) )?"
_SIDE = r"(?:slightly |slowly |quickly |gently )?(?:to |towards? )?(?:the |his |her |their |your |one )?"
_WAYS = (
    r"(?:left|right|sides?|around|away|back|forwards?|backwards?|up|upwards?|down|downwards?|camera|viewers?|audience)"
)
_OBJECT = _HIS + r"(?:left |right |own )?\w+"

# (the verb in any form, its -ing form, what must follow in the user's own words)
ACTIONS = (
    (r"turn(?:s|ing|ed)?", "turning", rf" {_HIS}(?:head |body |face |eyes )?{_SIDE}{_WAYS}"),
    (r"look(?:s|ing|ed)?", "looking", rf" (?:straight |directly )?(?:at |into )?{_SIDE}{_WAYS}(?! to )"),
    (r"glanc(?:e|es|ing|ed)", "glancing", rf" (?:at |into )?{_SIDE}{_WAYS}"),
    (
        r"rais(?:e|es|ing|ed)|lift(?:s|ing|ed)?",
        "raising",
        rf" {_HIS}(?:left |right )?(?:hands?|arms?|fingers?|fists?|eyebrows?|brows?|thumbs?|chin|head|glass|cup)",
    ),
    (r"lower(?:s|ing|ed)?", "lowering", rf" {_HIS}(?:left |right )?(?:hands?|arms?|head|gaze|eyes|chin|shoulders?)"),
    (r"wav(?:e|es|ing|ed)", "waving", rf"(?! of)(?: {_HIS}(?:left |right )?(?:hands?|arms?))?(?: goodbye| hello)?"),
    (r"nod(?:s|ding|ded)?", "nodding", rf"(?: {_HIS}head)?"),
    (r"sh(?:ake|akes|aking|ook)", "shaking", rf" {_HIS}(?:heads?|hands?|fists?|fingers?)"),
    (r"tilt(?:s|ing|ed)?", "tilting", rf" {_HIS}(?:heads?|face|chin)(?: {_SIDE}{_WAYS})?"),
    (r"shrug(?:s|ging|ged)?", "shrugging", rf"(?: {_HIS}shoulders)?"),
    (r"point(?:s|ing|ed)|point(?= at| up| down)", "pointing", rf"(?: (?:at|to|towards?) {_HIS}\w+| up| down)"),
    (r"clap(?:s|ping|ped)?", "clapping", rf"(?: {_HIS}hands)?"),
    (r"cross(?:es|ing|ed)?|fold(?:s|ing|ed)?", "crossing", rf" {_HIS}(?:arms|hands|legs)"),
    (r"spread(?:s|ing)?|open(?:s|ing|ed)?", "opening", rf" {_HIS}(?:arms|hands|eyes|mouth|lips)"),
    (r"clos(?:e|es|ing|ed)", "closing", rf" {_HIS}(?:eyes|mouth|lips|hands?)"),
    (r"touch(?:es|ing|ed)?|stroke(?:s|d)?|stroking", "touching", rf" (?!of |on |upon ){_OBJECT}"),
    (r"lean(?:s|ing|ed)?", "leaning", rf" (?:in|{_SIDE}{_WAYS})"),
    (r"step(?:s|ping|ped)?", "stepping", rf" {_SIDE}{_WAYS}"),
    (r"stand(?:s|ing)?|stood", "standing", r" (?:up|still)"),
    (r"s(?:it|its|itting|at)", "sitting", r" (?:down|still|up)"),
    (r"reach(?:es|ing|ed)?", "reaching", rf" (?:for|out)(?: {_OBJECT})?"),
    (r"pick(?:s|ing|ed)?", "picking", rf" up {_OBJECT}"),
    (r"h(?:old|olds|olding|eld)", "holding", rf" (?:up {_OBJECT}|{_HIS}(?:hands?|microphone|phone|cup|glass|book))"),
    (
        r"play(?:s|ing|ed)?|strum(?:s|ming|med)?",
        "playing",
        rf" {_HIS}(?:\w+ )?(?:guitar|piano|violin|drums?|flute|instrument)",
    ),
    (r"walk(?:s|ing|ed)?", "walking", rf"(?: {_SIDE}{_WAYS})?"),
    (r"danc(?:e|es|ing|ed)", "dancing", ""),
    (r"sings?|singing", "singing", ""),
    (r"gestur(?:e|es|ing)|gesticulat(?:e|es|ing)", "gesturing", r"(?: with \w+ hands?)?"),
    (r"bow(?:s|ing|ed)?", "bowing", r"(?! tie)"),
    (r"blink(?:s|ing|ed)?", "blinking", ""),
    (r"wink(?:s|ing|ed)?", "winking", ""),
    (r"sigh(?:s|ing|ed)?", "sighing", ""),
    (r"frown(?:s|ing|ed)?", "frowning", ""),
    (r"giv(?:e|es|ing)", "giving", r" (?:a )?thumbs[ -]up"),
)

# (pattern, camera, what the negative prompt says against it)
CAMERA = (
    (r"zoom(?:s|ing|ed)?(?: slowly| quickly)?[ -]in", "zoom in", "zoom out"),
    (r"zoom(?:s|ing|ed)?(?: slowly| quickly)?[ -]out", "zoom out", "zoom in"),
    (r"push(?:es|ing)?[ -]in|doll(?:y|ies|ying) in|camera (?:moves|comes|gets) closer", "push in", "pull back"),
    (r"pull(?:s|ing)?[ -](?:back|out)|doll(?:y|ies|ying) out|camera (?:moves|pulls) away", "pull back", "push in"),
    (
        r"pan(?:s|ning)?(?: slowly| quickly)? (?:to the )?left|camera moves(?: slowly)? (?:to the )?left",
        "pan left",
        "pan right",
    ),
    (
        r"pan(?:s|ning)?(?: slowly| quickly)? (?:to the )?right|camera moves(?: slowly)? (?:to the )?right",
        "pan right",
        "pan left",
    ),
    (r"(?:camera )?tilt(?:s|ing)?(?: slowly| quickly)? up", "tilt up", "tilt down"),
    (r"(?:camera )?tilt(?:s|ing)?(?: slowly| quickly)? down", "tilt down", "tilt up"),
    (r"orbit(?:s|ing)?|camera (?:circles|moves around)", "orbit", "static camera"),
    (r"tracking shot|camera follows", "tracking shot", "static camera"),
    (r"hand-?held", "handheld", "locked-off camera"),
    (
        r"(?:static|fixed|still|stationary|locked)(?:-off)? (?:camera|shot)"
        r"|camera (?:is|stays|remains|keeps|holds) (?:static|fixed|still|stationary)",
        "static",
        "camera movement, camera shake",
    ),
    (r"close[- ]?up", "close-up", "wide shot"),
    (r"(?:medium|mid|half-body|waist) shot", "medium shot", "extreme close-up"),
    (r"(?:wide|long|full|full-body) shot", "wide shot", "close-up"),
    (r"low[- ]angle", "low angle", "high angle"),
    (r"high[- ]angle", "high angle", "low angle"),
)
SLOW_CAMERA = r"slow|slowly|gentl[ey]|subtl[ey]|smooth|smoothly|gradual|gradually"
FAST_CAMERA = r"fast|quick|quickly|rapid|rapidly|sudden|suddenly"

TEMPO = {
    -1: r"slow(?:ly)?|subtl[ey]|minimal|motionless|restrained|stand(?:s|ing)? still|(?:holds?|keeps?|stays?) still"
    r"|small (?:gestures|movements)",
    1: r"fast|quick(?:ly)?|rapid(?:ly)?|brisk(?:ly)?|hectic|dynamic(?:ally)?"
    r"|(?:big|large|wide|broad|expansive|exaggerated|lively) (?:gestures|movements)",
}

_FEELING = "|".join(emotion.words for emotion in EMOTIONS.values())
_FELT = rf"(?: off| out)?(?= (?!\w+ing)(?:\w+ )?(?:{_FEELING})\b)"  # "starts calm", but not "starts smiling"
_NOUN_AHEAD = r"(?<!\bthe )(?<!\bher )(?<!\bhis )(?<!\bmy )(?<!\byour )(?<!\btheir )(?<!\ba )(?<!\bat )"
_OF = r"(?: of the (?:video|clip|speech|recording|talk|song|shot|performance))?(?! of)"

# When a clause happens. Adverbs open their clause unless nothing follows them; phrases stand before or after it.
EARLY_ADVERB = (
    rf"{_NOUN_AHEAD}first(?!-| time| person)|firstly|initially|to begin with"
    rf"|(?:starts?|begins?)(?: off| out)? (?:by|with|as)|(?:starts?|begins?){_FELT}"
)
EARLY_PHRASE = rf"at first|(?:at|in) the (?:very )?(?:beginning|start){_OF}"
NEXT_ADVERB = (
    r"then|next(?! to| door)|afterwards?|after that|after a while|later|subsequently|secondly|thirdly"
    r"|(?:slowly |gradually |suddenly )?becom(?:es?|ing)"
)
MIDDLE_PHRASE = rf"in the middle{_OF}|halfway(?: through)?|midway(?: through)?"
LATE_ADVERB = (
    r"finally|lastly|eventually|at last|(?:ends?|ending|finish(?:es|ing)?)(?: up| off)? (?:by|with|on|as)"
    rf"|(?:ends|finishes){_FELT}"
)
LATE_PHRASE = rf"(?:at|in|by|near|towards?) the (?:very )?end{_OF}"
