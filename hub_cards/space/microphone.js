// The microphone of the page: samples wait here until the server takes them, in order, none lost.
// Gradio's own streaming microphone leaves out and swaps pieces where a piece takes longer than its length.
window.microphone ??= {
  // Begin; return why the microphone cannot be used, "" if it can.
  async start() {
    this.stop();
    Object.assign(this, { waiting: [], number: 0 });
    if (!navigator.mediaDevices) return "browsers give it to pages of https and localhost only";
    try {
      await this.open();
    } catch (error) {
      this.stop();
      return error.message;
    }
    return "";
  },
  async open() {
    this.stream = await navigator.mediaDevices.getUserMedia({
      audio: { echoCancellation: true, noiseSuppression: false, autoGainControl: false },
    });
    this.context = new AudioContext();
    const code = `registerProcessor("samples", class extends AudioWorkletProcessor {
      process([[channel]]) { if (channel) this.port.postMessage(channel.slice()); return true; }
    });`;
    await this.context.audioWorklet.addModule(URL.createObjectURL(new Blob([code], { type: "text/javascript" })));
    const node = new AudioWorkletNode(this.context, "samples", {
      numberOfOutputs: 0, channelCount: 1, channelCountMode: "explicit",
    });
    node.port.onmessage = ({ data }) => this.waiting.push(data);
    this.context.createMediaStreamSource(this.stream).connect(node);
  },
  stop() {
    this.stream?.getTracks().forEach((track) => track.stop());
    this.context?.close();
    this.stream = this.context = null;
  },
  // What waits, as JSON: number of the piece, rate, 16-bit samples in base64; and whether it is the last one.
  take(last) {
    const rate = this.context?.sampleRate ?? 0;
    const blocks = (this.waiting ?? []).splice(0);
    const samples = new Int16Array(blocks.reduce((sum, block) => sum + block.length, 0));
    let at = 0;
    for (const block of blocks)
      for (const value of block) samples[at++] = Math.round(32767 * Math.max(-1, Math.min(1, value)));
    const bytes = new Uint8Array(samples.buffer);
    let text = "";
    for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
    if (last) this.stop();
    return JSON.stringify({ number: this.number++, rate, last, samples: btoa(text) });
  },
};
