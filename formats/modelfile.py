"""Ollama's Modelfile for a GGUF file: Ollama uses a Go template of its own instead of the one in the file."""

CHAT = """{{- range .Messages }}<s>{{ .Role }}
{{ .Content }}</s>
{{ end }}<s>assistant{{ "\\n" }}"""
# text/chat.py's thinking format. Ollama takes a template with .Thinking for that of a model that thinks, and the text
# around it for the tags; here it is only ever that of an earlier reply, which the format replaces by an empty thought.
THINKING = """{{- range .Messages }}<s>{{ .Role }}
{{ if eq .Role "assistant" }}{{ if false }}<think>{{ .Thinking }}</think>{{ end }}<think>

</think>
{{ end }}{{ .Content }}</s>
{{ end }}<s>assistant
{{ if and .IsThinkSet (not .Think) }}<think>

</think>{{ "\\n" }}{{ else }}<think>{{ end }}"""
CONTINUE = "<s>{{ .Prompt }}"


def modelfile(gguf_name: str, stage: str, context: int) -> str:
    """The text of a Modelfile beside `gguf_name`."""
    template = CONTINUE if stage == "pretrain" else THINKING if stage == "distill" else CHAT
    return (f'FROM ./{gguf_name}\nTEMPLATE """{template}"""\nPARAMETER stop "</s>"\nPARAMETER num_ctx {context}\n'
            "PARAMETER temperature 0.7\nPARAMETER top_p 0.9\n")
