"""The built-in corpus: a small Chinese world, written by make_demo_data.py.

words.py     the words it is made of
problems.py  counting problems: numbers, wordings, thoughts
facts.py     people and places, what is known of them
talk.py      small talk, and questions that cannot be answered
"""
