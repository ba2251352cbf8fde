"""Groups of related English words, for questions about meaning and as a small word list."""

RELATED = tuple(
    tuple(group.split())
    for group in (
        "horse sheep goat tiger rabbit monkey camel wolf donkey beaver otter badger",
        "eagle sparrow falcon raven pigeon heron parrot swallow owl robin",
        "red green yellow purple orange brown crimson violet turquoise scarlet",
        "hammer chisel pliers saw wrench screwdriver drill shovel rake axe",
        "apple pear cherry banana grape lemon peach apricot plum melon",
        "carrot potato onion cabbage spinach turnip celery radish lettuce leek",
        "shirt trousers jacket scarf glove stocking sweater skirt coat blouse",
        "piano violin trumpet flute guitar drum cello clarinet harp trombone",
        "teacher doctor farmer baker lawyer sailor carpenter nurse butcher tailor",
        "rain snow thunder storm fog hail frost breeze drizzle lightning",
        "river lake ocean stream pond sea brook canal lagoon creek",
        "table chair cupboard sofa shelf bench wardrobe stool desk bed",
        "mother father sister brother uncle aunt cousin nephew daughter grandmother",
        "arm elbow knee shoulder ankle wrist finger neck thumb stomach",
        "car train bicycle lorry ship ferry tram wagon airplane scooter",
        "happy glad cheerful merry joyful pleased delighted content jolly elated",
        "angry furious cross mad irate annoyed enraged bitter outraged cranky",
        "walk run jump crawl climb stroll gallop trot wander sprint",
        "say shout whisper speak mutter tell announce murmur declare explain",
        "big huge large giant enormous vast great massive immense tall",
        "monday tuesday wednesday thursday friday saturday sunday",
        "january march april june july august september october november december",
        "gold silver copper iron zinc lead nickel bronze platinum tin",
        "kitchen bedroom cellar attic hall bathroom pantry parlour study nursery",
    )
)
WORDS = tuple(dict.fromkeys(word for group in RELATED for word in group))
