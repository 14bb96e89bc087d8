"""Texts, chats and chat templates that tests of fine-tuning share."""

import json


TEXT = "The cat sat on the mat.\n\nThe dog looked at the cat and thought of bones.\n\n" * 12
CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Woof, cat."},
    {"role": "user", "content": "And you?"},
    {"role": "assistant", "content": "Bones!"},
]
# The same conversation as text; the second says which part of a message the assistant makes.
PLAIN = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}[assistant] {% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)
