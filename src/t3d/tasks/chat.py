"""Chats as TRL's datasets have them, and ShareGPT's: read from a record, and told for people."""

from t3d.errors import T3DError, characters, nearest

FIELDS = ("messages", "conversations", "prompt")
REPLY = "completion"
ROLES = ("system", "user", "assistant")
_SHAREGPT = {"human": "user", "gpt": "assistant"}


def find_chat(record: dict, chosen: str | None, where: str) -> tuple[list[dict], str | None] | None:
    """The messages that a record asks with, the last the user's, and the assistant's reply to them, if it has one.

    chosen: the field that has them; by default one of `FIELDS`. A text there, or a `question`, is no chat: None.
    Raises T3DError, which begins with `where`, for a chat that cannot be asked.
    """
    if chosen is None and record.get("question") is not None:
        chosen = "question"
    names = [name for name in ((chosen,) if chosen else FIELDS) if record.get(name) is not None]
    if len(names) > 1:
        found = " and ".join(map(repr, names))
        raise T3DError(f"{where}: the prompt may be in {found}; choose one with task.question_field")
    if not names or (not isinstance(record[names[0]], list) and (chosen or names[0] == "prompt")):
        return None
    if record.get("tools"):
        raise T3DError(f"{where}: a prompt with tools cannot be asked; leave such records out")
    messages = _messages(record[names[0]], names[0], where)
    if record.get(REPLY) is not None:
        messages += _messages(record[REPLY], REPLY, where)
        if messages[-1]["role"] != "assistant":
            raise T3DError(f"{where}: {REPLY} ends with the {messages[-1]['role']}'s message, not the assistant's")
    reply = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
    if not messages or messages[-1]["role"] != "user":
        last = f"the {messages[-1]['role']}'s message" if messages else "nothing"
        raise T3DError(f"{where}: before the answer comes {last}, not the user's")
    if not messages[-1]["content"].strip():
        raise T3DError(f"{where}: the user's last message is empty")
    return messages, reply or None


def find_reply(record: dict, where: str) -> str | None:
    """The completion of a prompt that is a text."""
    if record.get(REPLY) is None:
        return None
    *more, last = _messages(record[REPLY], REPLY, where)
    if more or last["role"] != "assistant":
        raise T3DError(f"{where}: {REPLY} of a prompt that is text must be text, or one message of the assistant")
    return last["content"] or None


def read_chat(record: dict, chosen: str | None, where: str) -> tuple[dict, list[dict] | None, str | None]:
    """The record with its chat, if it is one, as a text in the question's field; the chat's messages; the reply."""
    messages, reply = find_chat(record, chosen, where) or (None, find_reply(record, where))
    if messages is not None:
        record = record | {chosen or "question": transcript(messages)}
    return record, messages, reply


def transcript(messages: list[dict]) -> str:
    """The chat as one text: what the user says, if that is all, else every message behind its role."""
    messages = [message for message in messages if message["content"].strip()]
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)


def _messages(value, name: str, where: str) -> list[dict]:
    if name == REPLY and isinstance(value, str):
        return [{"role": "assistant", "content": characters(value, f"{where}: {name}")}]
    if not isinstance(value, list):
        raise T3DError(f"{where}: {name} is {type(value).__name__}, not a list of messages")
    if not value:
        raise T3DError(f"{where}: {name} holds no messages")
    return [_message(message, f"{where}: message {number} of {name}") for number, message in enumerate(value, start=1)]


def _message(message, where: str) -> dict:
    if not isinstance(message, dict):
        raise T3DError(f"{where} is {type(message).__name__}, not an object with role and content")
    if message.get("tool_calls"):
        raise T3DError(f"{where} calls a tool, which cannot be asked; leave such records out")
    role, content = message.get("role"), message.get("content")
    if role is None and isinstance(message.get("from"), str):
        role, content = _SHAREGPT.get(message["from"], message["from"]), message.get("value")
    if role not in ROLES:
        hint = nearest(role, ROLES) if isinstance(role, str) else ""
        raise T3DError(f"{where} has the role {role!r}{hint}; roles are {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise T3DError(f"{where}: the content is {type(content).__name__}, not text")
    return {"role": role, "content": characters(content, where)}
