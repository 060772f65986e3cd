// The script of a report: unpacks plotly, draws the panels, and keeps their step axes together.
//
// The page's data: {tables: {NAME: {COLUMN: [..]}}, panels: [..], axes: {NAME: {title, format}}}. A trace names a table and a
// column; texts in it are escaped for plotly already. Nothing of a run is ever put in the page as HTML here.
(function () {
  "use strict";

  const data = JSON.parse(document.getElementById("data").textContent);
  const darkQuery = window.matchMedia("(prefers-color-scheme: dark)");
  const narrowQuery = window.matchMedia("(max-width: 40rem)");
  const coarse = window.matchMedia("(pointer: coarse)").matches;
  const state = { axis: "step", range: null, following: false };
  const along = data.panels.filter((panel) => !panel.spectra);

  const LIGHT = { ink: "#1d2430", soft: "#5a6472", grid: "#e6e9ee", card: "#ffffff", rule: "#c4cad3" };
  const DARK = { ink: "#e6e9ee", soft: "#a3acb9", grid: "#2c3440", card: "#1d232c", rule: "#4a5462" };
  // The palette's darkest colors, for a dark ground.
  const ON_DARK = {
    "#0072B2": "#3D9BE0", "#882255": "#F0E442", "#444444": "#D8DCE2", "#7F7F7F": "#A8AEB8", "#D55E00": "#F07E2B",
    "#009E73": "#1FBF92",
  };

  const theme = () => (darkQuery.matches ? DARK : LIGHT);
  const color = (given) => (darkQuery.matches && ON_DARK[given]) || given;

  function faint(given) {
    const [r, g, b] = [1, 3, 5].map((i) => parseInt(given.slice(i, i + 2), 16));
    return `rgba(${r}, ${g}, ${b}, 0.18)`;
  }

  function column(trace, name) {
    const values = data.tables[trace.table][name];
    return values || [];
  }

  function positions(trace) {
    return data.tables[trace.table][state.axis] || [];
  }

  // Both arrays where both are known.
  function paired(x, y) {
    const rows = [];
    for (let i = 0; i < y.length; i++) if (y[i] !== null && x[i] !== null) rows.push(i);
    return { x: rows.map((i) => x[i]), y: rows.map((i) => y[i]), rows };
  }

  // The area between two curves: an outline for each stretch in which both are known, so that nothing is drawn over a gap.
  function outlines(x, low, high) {
    const drawn = { x: [], y: [] };
    for (let i = 0; i < x.length; i++) {
      const rows = [];
      for (; i < x.length && x[i] !== null && low[i] !== null && high[i] !== null; i++) rows.push(i);
      if (rows.length < 2) continue;
      const back = rows.slice().reverse();
      drawn.x.push(...rows.map((j) => x[j]), ...back.map((j) => x[j]), null);
      drawn.y.push(...rows.map((j) => high[j]), ...back.map((j) => low[j]), null);
    }
    return drawn;
  }

  function tracesOf(panel) {
    if (panel.spectra) return spectraTraces(panel);
    if (panel.heat) return heatTraces(panel);
    return panel.traces.flatMap((trace) => {
      const ink = color(trace.color);
      const group = `${trace.table}.${trace.y || trace.high}`;
      const base = {
        type: "scatter", name: trace.name, legendgroup: group, visible: trace.hidden ? "legendonly" : true, showlegend: true,
      };
      const x = positions(trace);
      if (trace.kind === "band") {
        const line = panel.traces.find((each) => each.kind === "line" && each.table === trace.table && each.y === trace.y);
        return [{
          ...base, ...outlines(x, column(trace, trace.low || `${trace.y}_low`), column(trace, trace.high || `${trace.y}_high`)),
          mode: "lines", line: { width: 0, color: ink }, fill: "toself", fillcolor: faint(ink), hoverinfo: "skip",
          showlegend: !trace.y, visible: line && line.hidden ? "legendonly" : true,
        }];
      }
      let y = trace.scale ? column(trace, trace.scale[0]).map((v) => (v === null ? null : v / trace.scale[1])) : column(trace, trace.y);
      const hovertemplate = `${trace.name}: %{y:.4~g}<extra></extra>`;
      if (trace.kind === "marks") {
        const kept = paired(x, y);
        return [{
          ...base, ...kept, mode: "markers", marker: { symbol: "x", size: 8, color: ink },
          hovertemplate: `${trace.name}<extra></extra>`,
        }];
      }
      if (trace.kind === "lane") {
        return [{
          ...base, x, y, mode: "lines+markers", line: { width: 14, color: ink }, marker: { size: 7, symbol: "line-ns", color: ink, line: { width: 2, color: ink } },
          connectgaps: false, hovertemplate: `${trace.hover}<extra></extra>`, legendgroup: trace.name,
          showlegend: Boolean(panel.legend && trace.legend),
        }];
      }
      let shownX = x;
      if (trace.sparse) {
        const kept = paired(x, y);
        [shownX, y] = [kept.x, kept.y];
      }
      const points = y.reduce((count, value) => count + (value !== null), 0);
      return [{
        ...base, x: shownX, y, mode: points <= 40 ? "lines+markers" : "lines", connectgaps: false, hovertemplate,
        line: { color: ink, dash: trace.dash, width: 1.8 }, marker: { size: 4, color: ink },
      }];
    });
  }

  function heatTraces(panel) {
    const x = panel.heat[state.axis] || panel.heat.step;
    return [{
      type: "heatmap", x, y: panel.heat.sites.map((_, i) => i), z: panel.heat.z, colorscale: "Cividis", hoverongaps: false,
      customdata: panel.heat.sites.map((site) => panel.heat.z[0].map(() => site)),
      hovertemplate: `%{customdata}<br>${panel.heat.title} %{z:.4~f}<extra></extra>`,
      colorbar: {
        orientation: "h", thickness: 10, len: 0.6, x: 0, xanchor: "left", y: 1.01, yanchor: "bottom", outlinewidth: 0, nticks: 6,
        tickfont: { color: theme().soft }, title: { text: panel.heat.title, side: "right", font: { color: theme().soft, size: 12 } },
      },
    }];
  }

  function spectraTraces(panel) {
    const chosen = state.spectra || { site: 0, step: panel.spectra.steps.length - 1 };
    const at = panel.spectra.sites[chosen.site].at[String(panel.spectra.steps[chosen.step])];
    if (!at) return [];
    return [
      ["p", "p, of the weight", "#0072B2", "solid"],
      ["q", "q, of the inputs", "#D55E00", "dash"],
    ].filter(([part]) => at[part].some((v) => v !== null)).map(([part, name, ink, dash]) => ({
      type: "scatter", mode: "lines", x: at.i, y: at[part].map((v) => (v > 0 ? v : null)), name, showlegend: true,
      line: { color: color(ink), dash, width: 1.8 }, hovertemplate: `${name}: %{y:.3~g}<extra></extra>`,
    }));
  }

  // The same for every panel, so that equal places mean equal steps.
  function wholeRange() {
    let [low, high] = [Infinity, -Infinity];
    for (const panel of along) {
      for (const trace of panel.traces) {
        for (const x of positions(trace)) if (x !== null) [low, high] = [Math.min(low, x), Math.max(high, x)];
      }
    }
    if (!(high > low)) return low === high ? [low - 1, high + 1] : null;
    const pad = (high - low) * 0.015;
    return [low - pad, high + pad];
  }

  function layoutOf(panel) {
    const { ink, soft, grid, card, rule } = theme();
    const narrow = narrowQuery.matches;
    const axis = { gridcolor: grid, linecolor: rule, zerolinecolor: grid, tickcolor: rule, tickfont: { color: soft, size: 11 }, ticks: "outside" };
    const titled = (text) => ({ text, font: { color: soft, size: 12 }, standoff: 6 });
    const described = data.axes[state.axis];
    const layout = {
      height: panel.height,
      margin: { l: narrow ? 54 : 92, r: narrow ? 8 : 40, t: 12, b: 42 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: ink, family: getComputedStyle(document.body).fontFamily, size: 12 },
      hovermode: panel.heat ? "closest" : "x unified",
      hoverlabel: { bgcolor: card, bordercolor: rule, font: { color: ink, size: 12 }, namelength: -1 },
      dragmode: coarse ? false : "zoom",
      modebar: { orientation: "v", bgcolor: "rgba(0,0,0,0)", color: soft, activecolor: ink },
      legend: { orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom", font: { color: ink, size: 12 }, bgcolor: "rgba(0,0,0,0)" },
      showlegend: !panel.heat && (panel.legend !== undefined ? panel.legend : panel.spectra || panel.traces.length > 1),
      uirevision: "kept",
      xaxis: { ...axis, title: titled(described.title), hoverformat: described.format, zeroline: false, unifiedhovertitle: { text: `${described.title} %{x:${described.format}}` } },
      yaxis: { ...axis, title: titled(panel.title), type: panel.log ? "log" : "linear", zeroline: false },
      shapes: [], annotations: [],
    };
    if (panel.spectra) {
      Object.assign(layout.xaxis, { type: "log", title: titled("direction, from the largest singular value down"), hoverformat: ",d", unifiedhovertitle: { text: "direction %{x:,d}" } });
      Object.assign(layout.xaxis, { tickvals: roundValues(panel.spectra.n), ticktext: roundValues(panel.spectra.n).map(shownNumber) });
      Object.assign(layout.yaxis, { exponentformat: "power", dtick: 1 });
      return layout;
    }
    const range = state.range || wholeRange();
    if (range) Object.assign(layout.xaxis, { range: range.slice(), autorange: false });
    if (panel.log) Object.assign(layout.yaxis, logTicks(panel));
    if (panel.lanes || panel.heat) {
      const names = panel.lanes || panel.heat.sites;
      const cut = narrow ? 14 : 40;
      Object.assign(layout.yaxis, {
        tickvals: names.map((_, i) => i), ticktext: names.map((name) => shortened(name, cut)), range: [names.length - 0.5, -0.5],
        automargin: narrow || Boolean(panel.heat) || Boolean(panel.legend), fixedrange: true, showgrid: Boolean(panel.lanes),
      });
    }
    for (const line of panel.lines || []) {
      layout.shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: line.y, y1: line.y, line: { color: color("#882255"), width: 1.2, dash: "dash" } });
      if (line.text) {
        layout.annotations.push({
          xref: "paper", x: 0.005, xanchor: "left", yref: "y", y: panel.log ? Math.log10(line.y) : line.y, yanchor: "bottom",
          text: line.text, showarrow: false, font: { size: 11, color: color("#882255") },
        });
      }
    }
    return layout;
  }

  const shownNumber = (value) => value.toLocaleString("en-US", { maximumSignificantDigits: 3 });

  // 1, 2, 5, 10, ... up to the value.
  function roundValues(most) {
    const found = [];
    for (let power = 1; power <= most; power *= 10) found.push(...[1, 2, 5].map((one) => one * power).filter((value) => value <= most));
    return found;
  }

  // Ticks of a log axis as plain numbers, also where the curves span less than a decade.
  function logTicks(panel) {
    const values = panel.traces.flatMap((trace) => column(trace, trace.y).filter((value) => value > 0));
    const [low, high] = values.reduce(([a, b], value) => [Math.min(a, value), Math.max(b, value)], [Infinity, 0]);
    if (!(low <= high)) return {};
    const leading = high / low > 8 ? [1, 2, 5] : high / low > 3 ? [1, 1.5, 2, 3, 4, 5, 6, 8] : [1, 1.1, 1.2, 1.35, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9];
    const ticks = [];
    for (let power = Math.floor(Math.log10(low)) - 1; power <= Math.log10(high) + 1; power++) ticks.push(...leading.map((one) => one * 10 ** power));
    return { tickvals: ticks, ticktext: ticks.map(shownNumber) };
  }

  // Cut an escaped text, and never within an entity.
  function shortened(escaped, most) {
    const units = escaped.match(/&[a-z]+;|[^]/g) || [];
    return units.length <= most ? escaped : `${units.slice(0, most - 6).join("")}…${units.slice(-5).join("")}`;
  }

  const chart = (panel) => document.getElementById(`chart-${panel.key}`);
  const config = () => ({
    responsive: true, displaylogo: false, displayModeBar: !(coarse || narrowQuery.matches), doubleClick: "reset+autosize",
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
  });

  function draw(panel) {
    return window.Plotly.react(chart(panel), tracesOf(panel), layoutOf(panel), config());
  }

  const drawAll = () => Promise.all(data.panels.map(draw));

  // Zooming one panel zooms the step axes of all.
  function follow(panel) {
    chart(panel).on("plotly_relayout", (change) => {
      if (state.following || !Object.keys(change).some((key) => key.startsWith("xaxis."))) return;
      const reset = change["xaxis.autorange"] === true;
      const shown = chart(panel).layout.xaxis.range;
      setRange(reset ? null : [shown[0], shown[1]], reset ? null : panel);
    });
  }

  function setRange(range, except) {
    const whole = wholeRange();
    const same = range && whole && Math.abs(range[0] - whole[0]) + Math.abs(range[1] - whole[1]) < 1e-9 * (whole[1] - whole[0]);
    state.range = same ? null : range;
    document.getElementById("reset").disabled = state.range === null;
    state.following = true;
    const target = state.range || whole;
    const done = along.filter((panel) => panel !== except).map((panel) => window.Plotly.relayout(chart(panel), { "xaxis.range": target.slice() }));
    return Promise.all(done).finally(() => { state.following = false; });
  }

  function controls() {
    const reset = document.getElementById("reset");
    reset.addEventListener("click", () => {
      state.range = null;
      reset.disabled = true;
      state.following = true;
      const free = (panel) => (panel.lanes || panel.heat || panel.spectra ? {} : { "yaxis.autorange": true });
      Promise.all(along.map((panel) => window.Plotly.relayout(chart(panel), { "xaxis.range": wholeRange(), ...free(panel) })))
        .finally(() => { state.following = false; });
    });
    for (const button of document.querySelectorAll("[data-axis]")) {
      button.addEventListener("click", () => {
        state.axis = button.dataset.axis;
        state.range = null;
        reset.disabled = true;
        for (const each of document.querySelectorAll("[data-axis]")) each.setAttribute("aria-pressed", String(each === button));
        drawAll();
      });
    }
    const panel = data.panels.find((each) => each.spectra);
    if (!panel) return;
    const [slider, told, layer] = ["spectra-step", "spectra-told", "spectra-layer"].map((id) => document.getElementById(id));
    const tell = () => {
      state.spectra = { site: layer ? Number(layer.value) : 0, step: Number(slider.value) };
      const step = panel.spectra.steps[state.spectra.step];
      const missing = panel.spectra.sites[state.spectra.site].at[String(step)] === undefined;
      told.textContent = `step ${step.toLocaleString("en-US")}${missing ? " (not recorded for this layer)" : ""}`;
    };
    const change = () => { tell(); draw(panel); };
    slider.addEventListener("input", change);
    if (layer) layer.addEventListener("change", change);
    tell();
  }

  async function unpack() {
    if (typeof DecompressionStream === "undefined") throw new Error("it cannot unpack gzip (DecompressionStream)");
    const packed = atob(document.getElementById("plotly").textContent.trim());
    const bytes = Uint8Array.from(packed, (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.appendChild(script);
    if (!window.Plotly) throw new Error("it did not run the charts' library");
  }

  async function start() {
    const root = document.documentElement;
    try {
      await unpack();
      root.classList.add("live");
      controls();
      await drawAll();
      along.forEach(follow);
      darkQuery.addEventListener("change", drawAll);
      narrowQuery.addEventListener("change", drawAll);
      root.dataset.ready = "yes";
    } catch (error) {
      root.classList.remove("live");
      root.dataset.ready = "no";
      document.getElementById("fallback-why").textContent = `: ${error.message}`;
    }
  }

  start();
})();
