// Records the microphone to a file in the browser's own format and shows its level.

const TYPES = ["audio/webm;codecs=opus", "audio/mp4", "audio/ogg;codecs=opus"];
const REASONS = {
  NotAllowedError: "The browser may not use the microphone. Allow it beside the address bar, then record again.",
  NotFoundError: "No microphone was found. Connect one, then record again.",
  NotReadableError: "The microphone is in use by another program. Close that program, then record again.",
};

// Why nothing can be recorded here, or null.
export function whyNot() {
  if (!isSecureContext) return "Browsers record only over https:// or on localhost. Open the page there, or choose a file.";
  if (!navigator.mediaDevices?.getUserMedia || !window.MediaRecorder) return "This browser cannot record. Choose a file instead.";
  return null;
}

export class Recorder {
  // Shows the level in `canvas`; `onTime(seconds)` about ten times a second.
  constructor(canvas, onTime) {
    Object.assign(this, { canvas, onTime, recorder: null });
  }

  get active() {
    return this.recorder !== null;
  }

  // Raises an error with a sentence that says why where it cannot record.
  async start() {
    if (whyNot()) throw new Error(whyNot());
    let stream;
    try {
      stream = await navigator.mediaDevices.getUserMedia({ audio: { echoCancellation: false } });
    } catch (error) {
      throw new Error(REASONS[error.name] ?? `The microphone cannot be used: ${error.message}`);
    }
    const mimeType = TYPES.find((type) => MediaRecorder.isTypeSupported(type));
    this.recorder = new MediaRecorder(stream, { mimeType });
    this.parts = [];
    this.recorder.ondataavailable = ({ data }) => data.size && this.parts.push(data);
    this.recorder.start(1000); // a part each second
    this.type = this.recorder.mimeType.split(";")[0];
    this.began = new Date();
    this.started = performance.now();
    this.#meter(stream);
  }

  // What has been recorded up to now.
  soFar() {
    return { ...this.#file(), seconds: (performance.now() - this.started) / 1000 };
  }

  // Ends the recording; returns {file, name}, or null if it is to be discarded or is empty.
  async stop(keep = true) {
    const { recorder, parts } = this;
    if (!recorder) return null;
    this.recorder = null;
    const ended = new Promise((resolve) => recorder.addEventListener("stop", resolve, { once: true }));
    if (recorder.state !== "inactive") recorder.stop(); // the microphone may have been unplugged
    else recorder.dispatchEvent(new Event("stop"));
    await ended;
    for (const track of recorder.stream.getTracks()) track.stop();
    clearInterval(this.timer);
    await this.context.close();
    return keep && parts.length ? this.#file() : null;
  }

  #file() {
    const [, format] = this.type.split("/");
    const time = this.began.toTimeString().slice(0, 8).replaceAll(":", "-");
    return { file: new Blob(this.parts, { type: this.type }), name: `Recording ${time}.${format === "mp4" ? "m4a" : format}` };
  }

  #meter(stream) {
    this.context = new AudioContext();
    const analyser = this.context.createAnalyser();
    analyser.fftSize = 2048;
    this.context.createMediaStreamSource(stream).connect(analyser);
    const samples = new Float32Array(analyser.fftSize);
    const levels = new Array(500).fill(0); // wider than any canvas
    this.timer = setInterval(() => {
      analyser.getFloatTimeDomainData(samples);
      const power = samples.reduce((sum, sample) => sum + sample * sample, 0) / samples.length;
      const level = Math.max(0, Math.min(1, 1 + (10 * Math.log10(power + 1e-9)) / 60)); // -60 dB to 0 dB
      levels.push(level);
      this.#draw(levels);
      this.canvas.setAttribute("aria-valuenow", Math.round(100 * level));
      this.onTime((performance.now() - this.started) / 1000);
    }, 80);
  }

  #draw(levels) {
    const { canvas } = this;
    const { clientWidth: width, clientHeight: height } = canvas;
    const scale = devicePixelRatio || 1;
    Object.assign(canvas, { width: width * scale, height: height * scale });
    const drawing = canvas.getContext("2d");
    drawing.scale(scale, scale);
    drawing.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--accent");
    levels.shift();
    levels.forEach((level, i) => {
      const bar = Math.max(2, level ** 2 * height);
      drawing.beginPath();
      drawing.roundRect(width - 4 * (levels.length - i), (height - bar) / 2, 2.5, bar, 1.2);
      drawing.fill();
    });
  }
}
