"""Texts of the demo model: numbers, dates, times, commands and sentences of a few hundred words, in four languages.

`sentence(language, rng)` draws one as a reader would write it, and its English translation where it is a number.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from num2words import num2words

LANGUAGES = ("en", "de", "es", "fr")


@dataclass(frozen=True)
class Sentence:
    """text: as written. english: the translation, for numbers in other languages."""

    text: str
    english: str | None = None


# Words by language, of each kind the same things. Gender is kept out of the templates' way by giving the article.
WORDS: dict[str, dict[str, str]] = {
    "en": {
        "room": "kitchen|bathroom|bedroom|garden|garage|office|hall|cellar",
        "device": "light|radio|television|fan|heating|alarm|camera|printer|coffee machine|washing machine",
        "person": "Anna|Peter|Maria|Thomas|Julia|Martin|Laura|David|Sophie|Michael|my mother|my brother|the doctor",
        "thing": "book|table|chair|bottle|key|letter|picture|clock|window|door|bicycle|ticket|bag|phone|map|hat",
        "food": "bread|milk|water|coffee|tea|rice|cheese|butter|sugar|salt|fish|soup|juice|fruit",
        "animal": "dog|cat|horse|bird|cow|sheep|mouse|rabbit",
        "place": "station|airport|market|school|hospital|church|museum|library|hotel|bridge|river|lake|beach|forest",
        "city": "London|Paris|Berlin|Madrid|Rome|Vienna|Boston|Lisbon",
        "color": "red|blue|green|yellow|black|white|brown|grey",
        "quality": "big|small|old|new|cheap|heavy|warm|cold|clean|empty|beautiful|broken",
        "weather": "sunny|cloudy|windy|rainy|foggy|hot|cold",
        "day": "Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday",
        "when": "today|tomorrow|tonight|now|next week|this evening|in the morning|after lunch",
        "month": "January|February|March|April|May|June|July|August|September|October|November|December",
        "unit": "minutes|hours|days|weeks|meters|kilometers|euros|degrees|people|pages",
    },
    "de": {
        "room": "in der Küche|im Bad|im Schlafzimmer|im Garten|in der Garage|im Büro|im Flur|im Keller",
        "device": "das Licht|das Radio|den Fernseher|den Ventilator|die Heizung|den Wecker|die Kamera|den Drucker",
        "person": "Anna|Peter|Maria|Thomas|Julia|Martin|Laura|David|Sophie|Michael|meine Mutter|mein Bruder",
        "thing": "das Buch|der Tisch|der Stuhl|die Flasche|der Schlüssel|der Brief|das Bild|die Uhr|das Fenster|die Tür"
        "|das Fahrrad|die Tasche|der Hut",
        "food": "Brot|Milch|Wasser|Kaffee|Tee|Reis|Käse|Butter|Zucker|Salz|Fisch|Suppe|Saft|Obst",
        "animal": "der Hund|die Katze|das Pferd|der Vogel|die Kuh|das Schaf|die Maus|der Hase",
        "place": "zum Bahnhof|zum Flughafen|zum Markt|zur Schule|zum Hotel|zur Kirche|zum Museum|zur Brücke|zum See",
        "city": "London|Paris|Berlin|Madrid|Rom|Wien|Hamburg|Zürich",
        "color": "rot|blau|grün|gelb|schwarz|weiß|braun|grau",
        "quality": "groß|klein|alt|neu|billig|schwer|warm|kalt|sauber|leer|schön|kaputt",
        "weather": "sonnig|bewölkt|windig|regnerisch|neblig|heiß|kalt",
        "day": "Montag|Dienstag|Mittwoch|Donnerstag|Freitag|Samstag|Sonntag",
        "when": "heute|morgen|heute Abend|jetzt|nächste Woche|am Morgen|nach dem Essen",
        "month": "Januar|Februar|März|April|Mai|Juni|Juli|August|September|Oktober|November|Dezember",
        "unit": "Minuten|Stunden|Tage|Wochen|Meter|Kilometer|Euro|Grad|Leute|Seiten",
    },
    "es": {
        "room": "la cocina|el baño|el dormitorio|el jardín|el garaje|la oficina|el pasillo|el sótano",
        "device": "la luz|la radio|la televisión|el ventilador|la calefacción|la alarma|la cámara|la impresora",
        "person": "Ana|Pedro|María|Tomás|Julia|Martín|Laura|David|Sofía|Miguel|mi madre|mi hermano",
        "thing": "el libro|la mesa|la silla|la botella|la llave|la carta|el cuadro|el reloj|la ventana|la puerta"
        "|la bicicleta|la bolsa|el sombrero",
        "food": "pan|leche|agua|café|té|arroz|queso|mantequilla|azúcar|sal|pescado|sopa|zumo|fruta",
        "animal": "el perro|el gato|el caballo|el pájaro|la vaca|la oveja|el ratón|el conejo",
        "place": "a la estación|al aeropuerto|al mercado|a la escuela|al hotel|a la iglesia|al museo|al puente|al lago",
        "city": "Londres|París|Berlín|Madrid|Roma|Viena|Sevilla|Lisboa",
        "color": "de color rojo|de color azul|de color verde|de color amarillo|de color negro|de color blanco",
        "quality": "grande|importante|elegante|barato|pesado|caliente|frío|limpio|nuevo|viejo|roto",
        "weather": "sol|viento|calor|frío|niebla|buen tiempo|mal tiempo",
        "day": "lunes|martes|miércoles|jueves|viernes|sábado|domingo",
        "when": "hoy|mañana|esta noche|ahora|la próxima semana|por la mañana|después de comer",
        "month": "enero|febrero|marzo|abril|mayo|junio|julio|agosto|septiembre|octubre|noviembre|diciembre",
        "unit": "minutos|horas|días|semanas|metros|kilómetros|euros|grados|personas|páginas",
    },
    "fr": {
        "room": "la cuisine|la salle de bain|la chambre|le jardin|le garage|le bureau|le couloir|la cave",
        "device": "la lumière|la radio|la télévision|le ventilateur|le chauffage|le réveil|la caméra|l'imprimante",
        "person": "Anne|Pierre|Marie|Thomas|Julie|Martin|Laura|David|Sophie|Michel|ma mère|mon frère",
        "thing": "le livre|la table|la chaise|la bouteille|la clé|la lettre|le tableau|la montre|la fenêtre|la porte"
        "|le vélo|le sac|le chapeau",
        "food": "du pain|du lait|de l'eau|du café|du thé|du riz|du fromage|du beurre|du sucre|du sel|du poisson",
        "animal": "le chien|le chat|le cheval|l'oiseau|la vache|le mouton|la souris|le lapin",
        "place": "à la gare|à l'aéroport|au marché|à l'école|à l'hôtel|à l'église|au musée|au pont|au lac",
        "city": "Londres|Paris|Berlin|Madrid|Rome|Vienne|Lyon|Genève",
        "color": "rouge|jaune|noir|blanc|rose|orange|marron",
        "quality": "magnifique|énorme|propre|vide|fragile|rapide|moderne|célèbre",
        "weather": "beau|mauvais|chaud|froid|frais|humide|gris",
        "day": "lundi|mardi|mercredi|jeudi|vendredi|samedi|dimanche",
        "when": "aujourd'hui|demain|ce soir|maintenant|la semaine prochaine|le matin|après le repas",
        "month": "janvier|février|mars|avril|mai|juin|juillet|août|septembre|octobre|novembre|décembre",
        "unit": "minutes|heures|jours|semaines|mètres|kilomètres|euros|degrés|personnes|pages",
    },
}

# n: a number from 2 to 99, hour: 1 to 12, minute: 5 to 55, date: a day's ordinal or number, year: 1900 to 2030.
TEMPLATES: dict[str, str] = {
    "en": """turn on the {device} in the {room}.|turn off the {device} in the {room}.|is the {device} on?
please call {person} {when}.|send a message to {person}.|where is the {thing}?|the {thing} is {quality}.
the {thing} is {color} and {quality}.|I would like some {food} and {food}.|do we have any {food}?
buy {food}, {food} and {food}.|the {animal} is in the {room}.|we saw a {color} {animal} near the {place}.
how do I get to the {place}?|the train to {city} leaves at {hour} {minute}.|I will be in {city} on {day}.
it is {weather} in {city} {when}.|will it be {weather} on {day}?|set the alarm for {hour} {minute}.
wake me up at {hour} {minute}.|set a timer for {n} {unit}.|it takes {n} {unit}.|there are {n} {unit} left.
my birthday is on {month} {date}.|the meeting is on {day}, {month} {date}.|she was born in {year}.
{person} has a {color} {animal}.|the {place} is closed {when}.|open the door, please.|thank you very much.
good morning, how are you?|stop the music.|what time is it?|it is half past {hour}.|it is a quarter to {hour}.
play the next song.|{person} lives in {city}.|can you help me {when}?|the {thing} costs {n} euros.""",
    "de": """schalte {device} {room} ein.|schalte {device} {room} aus.|mach bitte {device} an.
ruf bitte {person} an.|schick {person} eine Nachricht.|wo ist {thing}?|{thing} ist {quality}.
{thing} ist {color} und {quality}.|ich möchte gern {food} und {food}.|haben wir noch {food}?
kauf bitte {food}, {food} und {food}.|{animal} ist {room}.|{animal} ist {color}.
wie komme ich {place}?|der Zug nach {city} fährt um {hour} Uhr {minute}.|ich bin am {day} in {city}.
es ist {when} {weather} in {city}.|wird es am {day} {weather}?|stell den Wecker auf {hour} Uhr {minute}.
weck mich um {hour} Uhr {minute}.|es dauert {n} {unit}.|noch {n} {unit}, bitte.|wir gehen {when} {place}.
mein Geburtstag ist am {date} {month}.|das Treffen ist am {day}, dem {date} {month}.|sie wurde {year} geboren.
{person} wohnt in {city}.|mach bitte die Tür auf.|vielen Dank.|guten Morgen, wie geht es dir?
halt die Musik an.|wie spät ist es?|es ist halb {hour}.|spiel das nächste Lied.
kannst du mir {when} helfen?|{thing} kostet {n} Euro.""",
    "es": """enciende {device} en {room}.|apaga {device} en {room}.|llama a {person} {when}, por favor.
manda un mensaje a {person}.|¿dónde está {thing}?|{thing} es {quality}.|{thing} es {color}.
quiero {food} y {food}, por favor.|¿tenemos {food}?|compra {food}, {food} y {food}.|{animal} está en {room}.
¿cómo llego {place}?|el tren a {city} sale a las {hour} y {minute}.|voy a estar en {city} el {day}.
hoy hace {weather} en {city}.|¿hará {weather} el {day}?|pon la alarma a las {hour} y {minute}.
despiértame a las {hour} y {minute}.|faltan {n} {unit}.|son {n} {unit} en total.|vamos {place} {when}.
mi cumpleaños es el {date} de {month}.|la reunión es el {day} {date} de {month}.|ella nació en {year}.
{person} vive en {city}.|abre la puerta, por favor.|muchas gracias.|buenos días, ¿cómo estás?
para la música.|¿qué hora es?|son las {hour} y media.|pon la siguiente canción.
¿me puedes ayudar {when}?|{thing} cuesta {n} euros.""",
    "fr": """allume {device} dans {room}.|éteins {device} dans {room}.|appelle {person} {when}, s'il te plaît.
envoie un message à {person}.|où est {thing}?|{thing} est {quality}.|{thing} est {color}.
je voudrais {food} et {food}.|est-ce que nous avons {food}?|achète {food}, {food} et {food}.
{animal} est dans {room}.|comment aller {place}?|le train pour {city} part à {hour} heures {minute}.
je serai à {city} {day}.|il fait {weather} à {city} {when}.|mets le réveil à {hour} heures {minute}.
réveille-moi à {hour} heures {minute}.|il reste {n} {unit}.|cela fait {n} {unit}.|nous allons {place} {when}.
mon anniversaire est le {date} {month}.|la réunion est le {day} {date} {month}.|elle est née en {year}.
{person} habite à {city}.|ouvre la porte, s'il te plaît.|merci beaucoup.|bonjour, comment ça va?
arrête la musique.|quelle heure est-il?|il est {hour} heures et demie.|joue la chanson suivante.
tu peux m'aider {when}?|{thing} coûte {n} euros.""",
}
_CHOICES = {language: {kind: words.split("|") for kind, words in kinds.items()} for language, kinds in WORDS.items()}
_TEMPLATES = {language: text.replace("\n", "|").split("|") for language, text in TEMPLATES.items()}


def sentence(language: str, rng: random.Random) -> Sentence:
    """A sentence (11 of 20), a row of digits (5) or a number (4)."""
    kind = rng.random()
    if kind < 0.25:
        return _digits(language, rng)
    if kind < 0.45:
        return _number(language, rng)
    text = re.sub(r"\{(\w+)\}", lambda slot: _fill(slot[1], language, rng), rng.choice(_TEMPLATES[language]))
    return Sentence(_capital(text))


def spoken_digits(digits: list[int], language: str = "en") -> str:
    """Formats a row of digits: "Seven three one."."""
    return _capital(" ".join(_words(digit, language) for digit in digits) + ".")


def _digits(language: str, rng: random.Random) -> Sentence:
    digits = [rng.randrange(10) for _ in range(rng.randint(1, 7))]
    return Sentence(spoken_digits(digits, language), None if language == "en" else spoken_digits(digits))


def _number(language: str, rng: random.Random) -> Sentence:
    number = rng.randrange(rng.choice((20, 100, 1000, 10_000)))
    written = [_capital(_words(number, each) + ".") for each in (language, "en")]
    return Sentence(written[0], None if language == "en" else written[1])


def _words(number: int, language: str, to: str = "cardinal") -> str:
    words = num2words(number, lang=language, to=to)
    return words.replace("-", " ").replace(",", "") if language == "en" else words


def _fill(kind: str, language: str, rng: random.Random) -> str:
    if kind == "n":
        return _words(rng.randint(2, 99), language)
    if kind == "hour":
        return _words(rng.randint(2, 12), language)
    if kind == "minute":
        return _words(rng.randrange(5, 60, 5), language)
    if kind == "year":
        year = rng.randint(1900, 2030)
        return _words(year, language, "year" if language in ("en", "de") else "cardinal")
    if kind == "date":
        day = rng.randint(2, 31)
        if language == "de":
            return _words(day, language, "ordinal") + "n"
        return _words(day, language, "ordinal" if language == "en" else "cardinal")
    return rng.choice(_CHOICES[language][kind])


def _capital(text: str) -> str:
    """Capitalizes the first letter, even after punctuation."""
    at = next(i for i, letter in enumerate(text) if letter.isalpha())
    return text[:at] + text[at].upper() + text[at + 1 :]
