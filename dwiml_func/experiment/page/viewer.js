"use strict";
// Draws the page's streamlines with WebGL 2, the real ones beside the tracked ones, seen from one place.
// Axes: x to the right of the subject, y to the front, z up. A segment between two points is a rectangle of four corners.
(() => {
  const element = (id) => document.getElementById(id);
  const block = element("lines");
  const canvas = element("view");
  if (!block) return; // a run without streamlines
  const data = JSON.parse(block.textContent);

  const VERTEX = `#version 300 es
    in vec4 a, b; // ends of a segment, in units; w is twice the row of the legend, plus 1 for every other streamline
    uniform mat3 turn;
    uniform vec2 size; // pixels
    uniform float radius, zoom, width;
    uniform vec3 colours[16];
    uniform float shown[16]; // 0 where a row is hidden, else the width of its lines
    out vec3 colour;
    out float depth;
    const float AWAY = 4.0; // of the eye from the middle, in radii

    vec4 project(vec3 point) {
      vec3 q = turn * point / radius;
      float w = AWAY - q.z;
      vec2 xy = q.xy * zoom * 4.2 * min(size.x, size.y) / size;
      return vec4(xy, -q.z * w / 1.01, w);
    }

    void main() {
      int row = int(a.w) / 2;
      if (a.w != b.w || shown[row] == 0.0) { // ends of two streamlines
        gl_Position = vec4(2.0, 2.0, 2.0, 1.0);
        return;
      }
      vec4 from = project(a.xyz), to = project(b.xyz);
      vec2 along = (to.xy / to.w - from.xy / from.w) * size;
      along = length(along) > 1e-4 ? normalize(along) : vec2(1.0, 0.0);
      vec4 end = gl_VertexID < 2 ? from : to;
      vec2 corner = vec2(-along.y, along.x) * float((gl_VertexID & 1) * 2 - 1) + along * (gl_VertexID < 2 ? -0.5 : 0.5);
      end.xy += corner * width * shown[row] * AWAY / size; // nearer lines are wider
      gl_Position = end;
      colour = colours[row];
      depth = 0.5 + 0.5 * end.z / end.w;
    }`;
  const FRAGMENT = `#version 300 es
    precision mediump float;
    uniform vec3 paper;
    in vec3 colour;
    in float depth;
    out vec4 result;
    void main() { result = vec4(mix(colour, paper, 0.6 * smoothstep(0.25, 1.0, depth)), 1.0); }`;

  const gl = canvas.getContext("webgl2", { antialias: true, preserveDrawingBuffer: true });
  if (!gl) return; // the sentence about it stays
  document.documentElement.classList.add("has-view");

  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
  const vertices = (set) => {
    const points = new Int16Array(bytes(set.points));
    const lengths = new Uint32Array(bytes(set.lengths));
    const rows = new Uint8Array(bytes(set.entries));
    const all = new Int16Array((points.length / 3) * 4);
    let at = 0;
    lengths.forEach((length, line) => {
      for (let each = 0; each < length; each++, at++) {
        all.set(points.subarray(3 * at, 3 * at + 3), 4 * at);
        all[4 * at + 3] = 2 * rows[line] + (line % 2);
      }
    });
    return all;
  };

  let place = {};
  let arrays = {};
  const prepare = () => {
    const program = gl.createProgram();
    for (const [kind, source] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, source);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
    }
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(program));
    gl.useProgram(program);
    for (const name of ["turn", "size", "radius", "zoom", "width", "colours", "shown", "paper"])
      place[name] = gl.getUniformLocation(program, name);
    for (const [name, set] of Object.entries(data.sets)) {
      const values = vertices(set);
      const array = gl.createVertexArray();
      gl.bindVertexArray(array);
      gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
      gl.bufferData(gl.ARRAY_BUFFER, values, gl.STATIC_DRAW);
      ["a", "b"].forEach((end, number) => {
        const attribute = gl.getAttribLocation(program, end);
        gl.enableVertexAttribArray(attribute);
        gl.vertexAttribPointer(attribute, 4, gl.SHORT, false, 8, 8 * number);
        gl.vertexAttribDivisor(attribute, 1);
      });
      arrays[name] = { array, segments: Math.max(0, values.length / 4 - 1) };
    }
    gl.enable(gl.DEPTH_TEST);
    gl.enable(gl.SCISSOR_TEST);
  };
  prepare();

  const START = { azimuth: -60, elevation: 25, zoom: 1 };
  let eye = { ...START };
  let printing = false;
  const radians = (degrees) => (degrees * Math.PI) / 180;
  const axes = () => { // to the right, up, and towards the eye
    const [ca, sa] = [Math.cos(radians(eye.azimuth)), Math.sin(radians(eye.azimuth))];
    const [ce, se] = [Math.cos(radians(eye.elevation)), Math.sin(radians(eye.elevation))];
    return [[-sa, ca, 0], [-se * ca, -se * sa, ce], [ce * ca, ce * sa, se]];
  };
  const rgb = (text) => text.match(/[0-9.]+/g).slice(0, 3).map((value) => value / 255);
  const hex = (text) => [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16) / 255);

  const chosen = () => {
    const tracked = document.querySelector('input[name="tracked"]:checked');
    const names = element("show-real").checked ? ["real"] : [];
    return tracked && tracked.value !== "none" ? [...names, tracked.value] : names;
  };

  const label = (text, x, y, name) => {
    const span = document.createElement("span");
    span.textContent = text;
    span.className = name;
    span.style.left = `${(100 * x) / canvas.width}%`; // so that it stays there when the page is printed
    span.style.top = `${(100 * y) / canvas.height}%`;
    element("labels").append(span);
    return span;
  };

  const letters = (right, up, towards, box) => {
    const half = 0.5 * Math.min(box.width, box.height);
    [["L", [-1, 0, 0]], ["R", [1, 0, 0]], ["P", [0, -1, 0]], ["A", [0, 1, 0]], ["I", [0, 0, -1]], ["S", [0, 0, 1]]].forEach(
      ([text, axis]) => {
        const dot = (other) => axis.reduce((sum, value, at) => sum + value * other[at], 0);
        if (Math.hypot(dot(right), dot(up)) < 0.35) return; // it points at the eye
        const x = box.x + 0.5 * box.width + 0.92 * half * dot(right);
        const y = canvas.height - box.y - 0.5 * box.height - 0.92 * half * dot(up);
        label(text, x, y, "axis").style.opacity = dot(towards) < -0.3 ? 0.5 : 1;
      }
    );
  };

  const draw = () => {
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [Math.round(canvas.clientWidth * ratio), Math.round(canvas.clientHeight * ratio)];
    if (!width || !height || gl.isContextLost()) return;
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    canvas.style.aspectRatio = `${width} / ${height}`;
    const style = getComputedStyle(canvas);
    const ink = printing ? [0, 0, 0] : rgb(style.color);
    const paper = printing ? [1, 1, 1] : rgb(style.backgroundColor);
    const [right, up, towards] = axes();
    gl.uniformMatrix3fv(place.turn, true, [...right, ...up, ...towards]);
    gl.uniform1f(place.radius, data.radius);
    gl.uniform1f(place.zoom, eye.zoom);
    gl.uniform1f(place.width, 1.4 * ratio);
    gl.uniform3fv(place.paper, paper);
    gl.uniform3fv(place.colours, data.legend.flatMap((each) => (each.colour ? hex(each.colour) : ink)));
    const wide = (each, row) => (element(`entry-${row}`).checked ? (each.colour ? 1 : 0.8) : 0);
    gl.uniform1fv(place.shown, data.legend.map(wide));
    gl.scissor(0, 0, width, height);
    gl.clearColor(...paper, 1);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    element("labels").replaceChildren();
    const names = chosen();
    const beside = width > height;
    names.forEach((name, number) => {
      const share = 1 / names.length;
      const box = beside
        ? { x: Math.round(number * share * width), y: 0, width: Math.round(share * width), height }
        : { x: 0, y: Math.round((1 - (number + 1) * share) * height), width, height: Math.round(share * height) };
      gl.viewport(box.x, box.y, box.width, box.height);
      gl.scissor(box.x, box.y, box.width, box.height);
      gl.uniform2f(place.size, box.width, box.height);
      gl.bindVertexArray(arrays[name].array);
      gl.drawArraysInstanced(gl.TRIANGLE_STRIP, 0, 4, arrays[name].segments);
      const title = label(data.sets[name].title, box.x, height - box.y - box.height, "title");
      title.style.maxWidth = `${(100 * box.width) / width}%`;
      letters(right, up, towards, box);
    });
  };

  let waits = false;
  const redraw = () => {
    if (waits) return;
    waits = true;
    requestAnimationFrame(() => {
      waits = false;
      draw();
    });
  };
  const turn = (azimuth, elevation) => {
    eye.azimuth += azimuth;
    eye.elevation = Math.max(-90, Math.min(90, eye.elevation + elevation));
    redraw();
  };
  const zoom = (factor) => {
    eye.zoom = Math.max(0.3, Math.min(20, eye.zoom * factor));
    redraw();
  };
  const look = (azimuth, elevation) => {
    Object.assign(eye, { azimuth, elevation });
    redraw();
  };

  const fingers = new Map();
  const spread = () => {
    const [first, second] = [...fingers.values()];
    return Math.hypot(first.x - second.x, first.y - second.y);
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, { x: event.clientX, y: event.clientY });
  });
  canvas.addEventListener("pointermove", (event) => {
    const before = fingers.get(event.pointerId);
    if (!before) return;
    const apart = fingers.size === 2 ? spread() : 0;
    fingers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    if (fingers.size === 1) turn(0.4 * (before.x - event.clientX), 0.4 * (event.clientY - before.y));
    if (apart) zoom(spread() / apart);
  });
  for (const name of ["pointerup", "pointercancel"])
    canvas.addEventListener(name, (event) => fingers.delete(event.pointerId));
  canvas.addEventListener(
    "wheel",
    (event) => {
      if (!event.ctrlKey && document.activeElement !== canvas) return; // the page scrolls
      event.preventDefault();
      zoom(Math.exp(-0.002 * event.deltaY));
    },
    { passive: false }
  );
  const KEYS = {
    ArrowLeft: () => turn(10, 0),
    ArrowRight: () => turn(-10, 0),
    ArrowUp: () => turn(0, -10),
    ArrowDown: () => turn(0, 10),
    "+": () => zoom(1.2),
    "=": () => zoom(1.2),
    "-": () => zoom(1 / 1.2),
    0: () => Object.assign(eye, START) && redraw(),
  };
  canvas.addEventListener("keydown", (event) => {
    if (!KEYS[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    KEYS[event.key]();
  });
  element("from-right").addEventListener("click", () => look(0, 0));
  element("from-behind").addEventListener("click", () => look(-90, 0));
  element("from-above").addEventListener("click", () => look(-90, 90));
  element("zoom-in").addEventListener("click", () => zoom(1.2));
  element("zoom-out").addEventListener("click", () => zoom(1 / 1.2));
  element("controls").addEventListener("change", redraw);
  element("controls").addEventListener("submit", (event) => event.preventDefault());
  canvas.addEventListener("webglcontextlost", (event) => event.preventDefault());
  canvas.addEventListener("webglcontextrestored", () => {
    prepare();
    redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  for (const [name, now] of [["beforeprint", true], ["afterprint", false]])
    window.addEventListener(name, () => {
      printing = now;
      draw();
    });
  new ResizeObserver(redraw).observe(canvas);
  draw();
})();
