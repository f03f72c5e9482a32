"""A host's page: it writes every picture to one file, and has a button that has nothing to do with rendering."""

import gradio as gr
import toy_host

pipe = None


def enhance(prompt):
    return f"{prompt}!"


def render(prompt, steps, shift):
    drawn = pipe.generate(prompt, steps, shift)
    with open("example.txt", "w") as file:
        file.write(drawn)
    return "example.txt", drawn


if __name__ == "__main__":
    pipe = toy_host.Pipeline()
    with gr.Blocks() as demo:
        with gr.Row():
            with gr.Column():
                prompt = gr.Textbox(label="Prompt")
                better = gr.Button("Enhance")
                steps = gr.Slider(1, 100, value=28, step=1, label="Diffusion steps")
                shift = gr.Slider(0, 10, value=3.0, label="Shift")
                with gr.Row():
                    button = gr.Button("Run")
            outputs = [gr.Textbox(label="File"), gr.Textbox(label="Digest")]
        better.click(enhance, [prompt], [prompt])
        button.click(render, [prompt, steps, shift], outputs)
        demo.launch()
