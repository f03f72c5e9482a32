"""A client of ComfyUI's server, as its page is one: posts workflows over HTTP and listens to what the server tells it.

    python comfyui_client.py PORT < workflows.json > answers.json

Workflows come as a list in the format of the API. Of each the answer has what MagCache shows on nodes (id, text,
picture), the outputs that the history holds, and the pictures among them, read back over HTTP.
"""

import asyncio
import base64
import json
import sys

import aiohttp


async def run_prompt(session, address, socket, prompt):
    async with session.post(f"{address}/prompt", json={"prompt": prompt, "client_id": "tests"}) as answer:
        posted = await answer.json()
    if "prompt_id" not in posted:
        return {"error": posted}
    texts, error = [], None
    async for message in socket:
        if message.type == aiohttp.WSMsgType.TEXT:
            told = json.loads(message.data)
            if told["type"] == "magcache":
                texts.append([told["data"]["node"], told["data"]["text"], told["data"]["picture"]])
            if told["data"].get("prompt_id") == posted["prompt_id"]:
                if told["type"] == "execution_error":
                    error = told["data"]["exception_message"]
                if told["type"] in ("execution_success", "execution_error"):
                    break
    for _ in range(100):  # the history is written after the last message
        async with session.get(f"{address}/history/{posted['prompt_id']}") as answer:
            history = await answer.json()
        if history:
            break
        await asyncio.sleep(0.1)
    outputs = history[posted["prompt_id"]]["outputs"]
    pictures = {}
    for node, output in outputs.items():
        for picture in output.get("images", ()):
            async with session.get(f"{address}/view", params=picture) as answer:
                pictures[node] = base64.b64encode(await answer.read()).decode()
    return {"error": error, "texts": texts, "outputs": outputs, "pictures": pictures}


async def main():
    address = f"http://127.0.0.1:{sys.argv[1]}"
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{address}/object_info") as answer:
            known = await answer.json()
        async with session.get(f"{address}/extensions") as answer:
            scripts = [name for name in await answer.json() if "magcache" in name.lower()]
        async with session.ws_connect(f"{address}/ws?clientId=tests", max_msg_size=0) as socket:
            answers = [await run_prompt(session, address, socket, prompt) for prompt in json.load(sys.stdin)]
    ours = sorted(name for name, about in known.items() if about["category"] == "MagCache")
    print(json.dumps({"nodes": ours, "scripts": scripts, "answers": answers}))


asyncio.run(main())
