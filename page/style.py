"""The style of the page: colours, system fonts, and a layout for wide and narrow screens."""

import gradio as gr


SYSTEM_FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
SYSTEM_FONT_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def make_theme() -> gr.themes.Base:
    """Grey and one blue-green, with fonts that the visitor's machine has: nothing is fetched from elsewhere."""
    return gr.themes.Base(
        primary_hue="teal",
        secondary_hue="teal",
        neutral_hue="slate",
        radius_size="md",
        font=SYSTEM_FONT,
        font_mono=SYSTEM_FONT_MONO,
    ).set(
        block_border_width="0px",
        block_shadow="none",
        block_title_text_weight="600",
        block_title_text_size="*text_sm",
        input_border_width="1px",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_600",
        input_background_fill="white",
        input_background_fill_dark="*neutral_800",
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_text_color="white",
        slider_color="*primary_600",
    )


CSS = """
.gradio-container { max-width: 1280px !important; padding: 18px clamp(10px, 2.4vw, 24px) 32px !important; }
.gradio-container > main, .gradio-container .app { padding: 0 !important; max-width: none !important; }
footer { display: none !important; }

#head h1 { font-size: 1.35rem; font-weight: 650; margin: 0; }
#head p { margin: 2px 0 0; color: var(--body-text-color-subdued); font-size: .92rem; overflow-wrap: anywhere; }

/* what to generate, the images, the settings; on a wide screen the images stand right of both */
#page { display: grid; gap: 16px; grid-template-columns: 360px minmax(0, 1fr);
        grid-template-areas: "ask result" "settings result"; grid-template-rows: auto 1fr; align-items: start; }
#ask { grid-area: ask; }
#result { grid-area: result; }
#settings { grid-area: settings; }
#ask, #settings, #result { min-width: 0 !important; width: 100%; padding: 14px; border-radius: 12px; gap: 12px;
        background: var(--block-background-fill); border: 1px solid var(--border-color-primary); }
#ask .block, #settings .block { padding: 0; overflow: visible !important; flex-shrink: 0; }
#ask .form, #settings .form { border: 0; background: none; gap: 12px; box-shadow: none; overflow: visible; }
#ask .row, #settings .row { gap: 12px; }
#classes .token { padding: 1px 5px; font-size: .85rem; }
#classes .wrap-inner { gap: 5px; }
#seed-row { align-items: end; flex-wrap: nowrap; }
#seed-row .form { flex-wrap: nowrap; flex: 1 1 0; }
#seed-row .form > :first-child { flex-grow: 1.35; }
#seed-row span { white-space: nowrap; }
#new-seed { flex: 0 0 auto; height: 38px; font-weight: 500; }
#compare .wrap { gap: 6px; }
#compare label { padding: 5px 8px; font-size: .82rem; }

#result { min-height: 430px; position: sticky; top: 12px; }
#result .html-container { padding: 0; }
#result .hint { color: var(--body-text-color-subdued); margin: 0; padding: 150px 20px; text-align: center; }
.gallery { display: flex; flex-wrap: wrap; gap: 12px 8px; --factor: var(--wide); }
.gallery figure { margin: 0; max-width: 100%; }
.gallery figure > div { display: flex; flex-wrap: wrap; gap: 2px; }
.gallery img { width: calc(var(--width) * var(--factor) * 1px); height: calc(var(--height) * var(--factor) * 1px);
        image-rendering: pixelated; margin: 0 !important; border-radius: 2px; max-width: none; display: block; }
.gallery figcaption { margin-top: 3px; font-size: .85rem; color: var(--body-text-color-subdued); overflow: hidden;
        text-overflow: ellipsis; white-space: nowrap; contain: inline-size; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 18px; }
.side { min-width: 0; }
.side h2 { font-size: .95rem; font-weight: 600; margin: 0 0 8px; overflow-wrap: anywhere; }

#status { min-height: 26px; }
/* Gradio's own word for what was stopped while images were on their way */
#status span.error { display: none; }
.note, .problem { margin: 0; font-size: .95rem; }
.problem { padding: 10px 12px; border-radius: 8px; border-left: 4px solid #dc2626; background: #fef2f2;
        color: #7f1d1d !important; overflow-wrap: anywhere; }
.dark .problem { background: #450a0a; color: #fecaca !important; }
.progress { display: flex; gap: 12px; align-items: center; font-size: .9rem; font-variant-numeric: tabular-nums; }
.progress progress { flex: 1; height: 8px; accent-color: var(--primary-600); }
.again { margin-top: 6px; font-size: .85rem; color: var(--body-text-color-subdued); }
.again summary { cursor: pointer; }
.again pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: 8px 10px; margin: 6px 0 0; border-radius: 6px;
        background: var(--neutral-100); font-family: var(--font-mono); }
.dark .again pre { background: var(--neutral-800); }
#downloads { gap: 8px; flex-wrap: wrap; }
#downloads > * { flex: 1 1 120px; min-width: 0; }

@media (max-width: 820px) {
  #page { grid-template-columns: minmax(0, 1fr); grid-template-rows: none; gap: 12px;
          grid-template-areas: "ask" "result" "settings"; }
  #ask, #settings, #result { padding: 12px; }
  #result { min-height: 200px; position: static; }
  #result .hint { padding: 50px 10px; }
  .gallery { --factor: var(--narrow); }
  .sides { gap: 10px; }
}
"""
