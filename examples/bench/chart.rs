//! The ratios to rathole, drawn.

use std::error::Error;

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::report::{RATIOS, Results};
use crate::rows::Better;

/// In pixels; as wide as a README is shown.
const WIDTH: u32 = 900;
const HEAD: i32 = 100;
const GROUP: i32 = 46;
const BAR: i32 = 16;
/// Where bars begin, and where the longest one ends, with room for its figure.
const LEFT: i32 = 380;
const RIGHT: i32 = 830;

/// A bar is cut there, so that the others can still be compared; its figure is not.
const LONGEST: f64 = 8.0;

const COLOURS: [RGBColor; 2] = [RGBColor(46, 111, 178), RGBColor(222, 125, 44)];
const LEGEND: [&str; 2] = ["plain against rathole", "key against rathole with Noise"];
const INK: RGBColor = RGBColor(40, 40, 40);
const FONT: &str = "sans-serif";

/// The two bars of a figure, if there are values for them.
struct Group {
    label: String,
    times: [Option<f64>; 2],
}

/// An SVG document; none if there is nothing to compare.
pub fn draw(results: &Results) -> Result<Option<String>, Box<dyn Error + Send + Sync>> {
    let groups = groups(results);
    if groups.is_empty() {
        return Ok(None);
    }
    let height = HEAD + GROUP * groups.len() as i32 + BAR;
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, height as u32)).into_drawing_area();
        paint(&area, &groups, height).map_err(|error| format!("drawing the chart: {error}"))?;
    }
    Ok(Some(svg))
}

/// How many times as good as rathole each figure is, whichever way is better.
fn groups(results: &Results) -> Vec<Group> {
    let groups = results.figures().map(|(row, number, figure)| Group {
        label: format!("{}: {}", row.name, figure.what),
        times: [RATIOS[0], RATIOS[1]].map(|of| {
            let ratio = results.ratio(row, number, of)?;
            Some(match figure.better {
                Better::Higher => ratio,
                Better::Lower => 1.0 / ratio,
            })
        }),
    });
    let has_bars = |group: &Group| group.times.iter().any(Option::is_some);
    groups.filter(has_bars).collect()
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type Drawn<'a> = Result<(), DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>>;

fn paint<'a>(area: &Area<'a>, groups: &[Group], height: i32) -> Drawn<'a> {
    let all = groups.iter().flat_map(|group| group.times).flatten();
    let longest = all.fold(1.0, f64::max).min(LONGEST);
    let end =
        |times: f64| LEFT + (times.min(longest) / longest * f64::from(RIGHT - LEFT)).round() as i32;
    area.fill(&WHITE)?;
    text(
        area,
        "Times as good as rathole; longer is better",
        (16, 26),
        20,
        HPos::Left,
    )?;
    for (at, (legend, colour)) in LEGEND.into_iter().zip(COLOURS).enumerate() {
        let x = 16 + 220 * at as i32;
        area.draw(&bar((x, 48), (x + BAR, 48 + BAR), colour))?;
        text(area, legend, (x + BAR + 6, 48 + BAR / 2), 17, HPos::Left)?;
    }
    for (at, group) in groups.iter().enumerate() {
        let top = HEAD + GROUP * at as i32;
        text(area, &group.label, (LEFT - 10, top + BAR), 17, HPos::Right)?;
        for ((times, colour), y) in group.times.into_iter().zip(COLOURS).zip([top, top + BAR]) {
            let Some(times) = times else { continue };
            area.draw(&bar((LEFT, y), (end(times), y + BAR), colour))?;
            // Behind the line, where the bar does not reach it.
            let label = (end(times.max(1.0)) + 6, y + BAR / 2);
            text(area, &format!("{times:.2}"), label, 15, HPos::Left)?;
        }
    }
    let (one, top) = (end(1.0), HEAD - 6);
    text(area, "1", (one, top - 8), 15, HPos::Center)?;
    area.draw(&PathElement::new(
        [(one, top), (one, height - BAR / 2)],
        INK,
    ))
}

fn bar(from: (i32, i32), to: (i32, i32), colour: RGBColor) -> Rectangle<(i32, i32)> {
    Rectangle::new([from, to], colour.filled())
}

/// `at` is the middle of its height, at the end that `side` names.
fn text<'a>(area: &Area<'a>, text: &str, at: (i32, i32), size: i32, side: HPos) -> Drawn<'a> {
    let style = (FONT, size).into_text_style(area).color(&INK);
    area.draw_text(text, &style.pos(Pos::new(side, VPos::Center)), at)
}
