"""How the page looks: theme, style sheet, and the few lines of script that Gradio has no word for."""

import gradio as gr

FONT = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def theme() -> gr.themes.Base:
    """Only fonts that are there: the page fetches nothing from anywhere."""
    return gr.themes.Soft(
        primary_hue="indigo", secondary_hue="indigo", neutral_hue="slate", radius_size="md", font=FONT, font_mono=MONO
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_text_color="white",
        button_secondary_background_fill_hover_dark="*neutral_500",  # also that of buttons that are off
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        block_title_text_color="*primary_600",
        block_title_padding="0",
        block_label_text_color="*primary_600",
        block_label_border_width="0px",
        checkbox_border_color="*neutral_500",
        checkbox_border_color_dark="*neutral_400",
        slider_color="*primary_600",
        slider_color_dark="*primary_400",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
    )


CSS = """
.gradio-container { overflow: clip !important; width: 100%; max-width: 1320px !important; margin: 0 auto !important; }

#gallery .empty { border: 0; }
#gallery .empty::after { content: "Pictures appear here. Say what to paint and press Generate."; font-size: .9rem; margin-top: 10px; }
#gallery .empty { flex-direction: column; display: flex; align-items: center; justify-content: center; }
#title { margin: 2px 0 0; }
#title h1 { font-size: 1.35rem; margin: 0; letter-spacing: -.01em; }
#title p { margin: 2px 0 0; color: var(--body-text-color-subdued); }
.note p, .note li, .note { color: var(--body-text-color-subdued); font-size: .92rem; }
.warn { border-left: 3px solid #d97706; padding: 2px 0 2px 10px; }

/* progress of a painting or a run: keeps its height, so that nothing jumps */
.status { min-height: 40px; font-size: .92rem; color: var(--body-text-color-subdued); }
.status .bar { height: 6px; border-radius: 3px; background: var(--border-color-primary); overflow: hidden; margin: 4px 0 6px; }
.status .bar i { display: block; height: 100%; background: var(--primary-500); border-radius: 3px; transition: width .15s; }
.status .head { display: flex; justify-content: space-between; gap: 12px; flex-wrap: wrap; }
.status b { color: var(--body-text-color); font-weight: 600; }

/* pictures: as many in a row as fit */
.pictures .grid-container { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)) !important; }
.pictures .caption-label { max-width: calc(100% - 12px) !important; font-size: .7rem; padding: 1px 6px; white-space: normal !important; overflow-wrap: anywhere; }
.photos .caption-label { font-size: .68rem; padding: 0 5px; opacity: .9; }
.photos .grid-container { grid-template-columns: repeat(auto-fill, minmax(84px, 1fr)) !important; }
.photos .grid-wrap, .photos .gallery-container, .photos { height: auto !important; min-height: 0 !important; max-height: 320px; }
.undo { align-items: center; padding: 2px 12px; }
.undo > :first-child { flex: 0 1 auto !important; width: auto !important; }
.toys { gap: 8px !important; align-items: stretch; }
#new-seed { display: flex; align-items: flex-end; padding-bottom: 18px; }
.html-container { padding-top: 0 !important; padding-bottom: 0 !important; }
footer .divider { display: none !important; }
#photo-remarks, #estimate { padding: 0 12px; }
.inset { padding: 8px 14px !important; background: var(--block-background-fill) !important; }
.settings { font-size: .86rem; color: var(--body-text-color-subdued); overflow-wrap: anywhere; min-height: 2.8em; }
.settings b { color: var(--body-text-color); }

/* cards of the library */
.cards { display: grid !important; grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)); gap: 14px; }
.card { border: 1px solid var(--border-color-primary); border-radius: 10px; background: var(--block-background-fill);
        overflow: hidden; padding: 0 !important; gap: 0 !important; min-width: 0 !important; }
.card .html-container { padding: 0 !important; }
.card .face { height: 190px; background: var(--background-fill-secondary); display: flex; align-items: center; justify-content: center; overflow: hidden; }
.card .face img { width: 100%; height: 100%; object-fit: contain; }
.card .face.none { background: var(--background-fill-secondary); color: var(--body-text-color-subdued); font-size: .9rem; }
.card .text { padding: 10px 14px 4px; font-size: .88rem; line-height: 1.5; }
.card .text h3 { margin: 0 0 2px; font-size: 1.05rem; overflow-wrap: anywhere; }
.card .text .words { font-style: italic; overflow-wrap: anywhere; }
.card .text .facts { color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
.card .bars { display: flex; align-items: flex-end; gap: 3px; height: 44px; margin: 8px 0 2px; }
.card .bars span { flex: 1; background: var(--primary-400); border-radius: 2px 2px 0 0; min-height: 1px; }
.card .bars span.text-encoder { background: #d97706; }
.card .legend { font-size: .72rem; color: var(--body-text-color-subdued); }
.rename textarea { border: 1px solid var(--border-color-primary) !important; }
.rename { padding: 4px 12px; align-items: center; gap: 6px !important; }
.actions { gap: 6px !important; padding: 6px 12px 12px !important; flex-wrap: wrap !important; }
.actions button, .actions a { min-width: 0 !important; flex: 1 1 auto !important; }

.sheet img { width: 100%; max-width: 720px; border-radius: 8px; display: block; }
.enlarge, .enlarged { padding: 0; border: 0; background: none; cursor: zoom-in; display: block; width: 100%; }
.enlarged { cursor: zoom-out; position: fixed; inset: 0; margin: auto !important; width: fit-content; height: fit-content;
        background: var(--block-background-fill); padding: 8px; border-radius: 10px; }
.enlarged:not(:popover-open) { display: none; }
.sheet .enlarged img { width: auto; max-width: 92vw; max-height: 88vh; min-width: min(88vw, 88vh); object-fit: contain; }
.enlarged::backdrop { background: rgb(0 0 0 / .7); }

/* the list of runs */
.runs { display: flex; flex-direction: column; gap: 4px; max-height: 330px; overflow-y: auto; padding: 2px; }
.run { display: flex; align-items: center; gap: 8px; padding: 4px 10px 4px 4px; border-radius: 8px; background: var(--block-background-fill); }
.run.chosen { box-shadow: inset 3px 0 0 var(--primary-500); background: var(--background-fill-secondary); }
.run .show { flex: 1; min-width: 0; display: flex; gap: 10px; align-items: center; text-align: left; font-size: .86rem; line-height: 1.35;
        color: var(--body-text-color-subdued); background: none; border: 0; cursor: pointer; overflow-wrap: anywhere; }
.run .show b { color: var(--body-text-color); }
.run .face { flex: none; width: 44px; height: 44px; border-radius: 6px; overflow: hidden; background: var(--border-color-primary); }
.run .face img { width: 100%; height: 100%; object-fit: cover; display: block; }
.run .small { flex: none; font-size: .8rem; padding: 5px 10px; border-radius: 6px; color: var(--button-secondary-text-color);
        background: var(--button-secondary-background-fill); border: 1px solid var(--border-color-primary); cursor: pointer; }
.run .small:hover { background: var(--button-secondary-background-fill-hover); }
.empty { text-align: center; padding: 34px 16px; color: var(--body-text-color-subdued); border: 1px dashed var(--border-color-primary); border-radius: 10px; }
.figures { border-collapse: collapse; margin: 10px 0 4px; font-size: .9rem; width: 100%; max-width: 720px; border: 0 !important; }
.figures tr { border: 0 !important; }
.figures td, .figures th { padding: 4px 0 4px 12px !important; text-align: right; font-weight: 400; border: 0 !important;
        border-top: 1px solid var(--border-color-primary) !important; vertical-align: bottom; }
.figures th { border-top: 0 !important; color: var(--body-text-color-subdued); font-size: .8rem; line-height: 1.2; }
.figures th:first-child, .figures td:first-child { text-align: left; padding-left: 0 !important; }
pre.log { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .78rem; max-height: 220px; overflow-y: auto; }

/* the way of a slider is seen, and so is its knob */
input[type=range] { --neutral-200: #8290a5; --neutral-300: #8290a5; --neutral-600: #8290a5; --neutral-700: #8290a5; }
input[type=range]::-webkit-slider-thumb { border: 2px solid var(--primary-600); }
input[type=range]::-moz-range-thumb { border: 2px solid var(--primary-600); }

/* what starts things stays in sight, and what has the focus beside it */
html { scroll-padding-block: 72px 84px; }
.in-sight { position: sticky; z-index: 60; bottom: 0; background: var(--body-background-fill); padding: 8px 0 !important; }
.in-sight.top { top: 0; bottom: auto; }
:focus-visible { outline: 2px solid var(--primary-500) !important; outline-offset: 2px; }

@media (pointer: coarse) {
  button, [role=tab], label:has(> input[type=radio]), .wrap-inner, input:not([role], [type=radio], [type=checkbox], [type=range]) { min-height: 40px; }
  .head .tab-like-container { height: 42px; margin-bottom: 0; }
  label.checkbox-container { min-height: 40px; display: inline-flex; align-items: center; }
  input[type=range] { height: 40px; }
  .reset-button { min-width: 40px; }
}
@media (max-width: 640px) {
  .in-sight, .in-sight.top { position: fixed; left: 0; right: 0; bottom: 0; top: auto; padding: 8px 12px !important; }
  .tabitem { padding-bottom: 64px !important; }
  .gradio-container, main.fillable { padding: 6px !important; }
  #title p { display: none; }
  .pictures .grid-container { grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)) !important; }
  .cards { grid-template-columns: 1fr; }
  .run { flex-wrap: wrap; justify-content: flex-end; }
  .run .show { flex-basis: 100%; }
}
"""

# Small pictures (the embedded base paints 64 pixels) are shown with crisp pixels; Ctrl+Enter presses Generate; the address
# names the open tab, and opens it again; arrow keys go from tab to tab; while there is no adapter, the page begins on Train.
HEAD = """
<script>
document.addEventListener("load", (event) => {
  const image = event.target;
  if (image.tagName === "IMG" && image.naturalHeight && image.naturalHeight <= 160) image.style.imageRendering = "pixelated";
}, true);
document.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  const button = document.querySelector("#generate-button");
  if (button && button.offsetParent && !button.disabled) { event.preventDefault(); button.click(); }
});
const tabs = () => [...document.querySelectorAll("[role=tab]")];
const called = (tab) => "#" + tab.textContent.trim().toLowerCase();
const asked = location.hash;
let wanted = asked;
let chosen = false;  // a tab, by a person
document.addEventListener("click", (event) => {
  chosen ||= event.isTrusted && Boolean(event.target.closest("[role=tab]"));
}, true);
window.beginOnTrain = (empty) => { if (empty && !asked && !chosen) tabs().find((tab) => called(tab) === "#train")?.click(); };
document.addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step || event.target.getAttribute("role") !== "tab") return;
  const all = tabs().filter((tab) => tab.offsetParent);
  const next = all[(all.indexOf(event.target) + step + all.length) % all.length];
  event.preventDefault();
  next.focus();
  next.click();
});
new MutationObserver(() => {
  const open = tabs().find((tab) => tab.getAttribute("aria-selected") === "true");
  const other = wanted && tabs().find((tab) => called(tab) === wanted);
  if (other) { wanted = ""; other.click(); }
  else if (open && !wanted && location.hash !== called(open)) history.replaceState(null, "", called(open));
}).observe(document, { subtree: true, childList: true, attributes: true, attributeFilter: ["aria-selected"] });
addEventListener("hashchange", () => tabs().find((tab) => called(tab) === location.hash)?.click());
</script>
"""
