//! The two figures: switch time over live stack, and over the number of flows. SVG, both axes logarithmic.

use super::switch::{Curve, Curves};
use plotters::prelude::*;
use std::error::Error;
use std::path::Path;

/// Width of a figure, of the part of it that says which curve is which, and its height.
const WIDE: u32 = 1000;
const LEGEND: u32 = 160;
const HIGH: u32 = 560;

/// Colours that can be told apart on white, in the order of the curves.
const COLOURS: [(u8, u8, u8); 8] = [
    (200, 30, 30),
    (40, 150, 60),
    (20, 80, 20),
    (40, 110, 200),
    (20, 30, 120),
    (130, 40, 160),
    (220, 120, 20),
    (110, 110, 110),
];

/// Draws both into `dir`.
pub fn draw(dir: &Path, curves: &Curves) -> Result<(), Box<dyn Error>> {
    std::fs::create_dir_all(dir)?;
    let in_kib: Vec<Curve> = curves
        .over_live
        .iter()
        .map(|(name, points)| (name.clone(), points.iter().map(|(x, y)| (x / 1024.0, *y)).collect()))
        .collect();
    figure(
        &dir.join("switch-over-live-stack.svg"),
        "Switch time over live stack, 2 threads",
        "live stack, KiB",
        &in_kib,
    )?;
    figure(
        &dir.join("switch-over-flows.svg"),
        "Switch time over the number of flows, 8 KiB of live stack",
        "flows",
        &curves.over_threads,
    )
}

fn figure(path: &Path, title: &str, x: &str, curves: &[Curve]) -> Result<(), Box<dyn Error>> {
    let points = || curves.iter().flat_map(|c| c.1.iter().copied());
    if points().count() == 0 {
        return Ok(());
    }
    let least = |f: fn((f64, f64)) -> f64| points().map(f).fold(f64::INFINITY, f64::min);
    let most = |f: fn((f64, f64)) -> f64| points().map(f).fold(0.0, f64::max);
    let (x_range, y_range) =
        (least(|p| p.0) * 0.9..most(|p| p.0) * 1.2, least(|p| p.1) * 0.7..most(|p| p.1) * 1.5);
    let area = SVGBackend::new(path, (WIDE, HIGH)).into_drawing_area();
    area.fill(&WHITE)?;
    // Beside the curves, for there is no corner that none of them passes.
    let (plot, legend) = area.split_horizontally(WIDE - LEGEND);
    let mut chart = ChartBuilder::on(&plot)
        .caption(title, ("sans-serif", 20))
        .margin(14)
        .margin_right(28)
        .x_label_area_size(44)
        .y_label_area_size(70)
        .build_cartesian_2d(x_range.log_scale(), y_range.log_scale())?;
    chart
        .configure_mesh()
        .x_desc(x)
        .y_desc("ns a switch")
        .x_label_formatter(&|v| format!("{v:.0}"))
        .y_label_formatter(&|v| format!("{v:.0}"))
        .draw()?;
    let drawn = curves.iter().zip(COLOURS).filter(|(c, _)| !c.1.is_empty());
    for (line, ((name, points), (r, g, b))) in drawn.enumerate() {
        let colour = RGBColor(r, g, b);
        chart.draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)).point_size(3))?;
        let y = 60 + 24 * line as i32;
        legend.draw(&PathElement::new([(0, y), (22, y)], colour.stroke_width(2)))?;
        legend.draw(&Text::new(name.clone(), (30, y - 7), ("sans-serif", 14)))?;
    }
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_curve_is_drawn_and_named() {
        let curve = |name: &str, y: f64| (name.to_owned(), vec![(8192.0, y), (65536.0, y * 2.0)]);
        let curves = Curves {
            over_live: vec![curve("alias, conflict", 5000.0), ("empty".to_owned(), Vec::new())],
            over_threads: (0..COLOURS.len()).map(|i| curve(&format!("way {i}"), 10.0)).collect(),
        };
        let dir = std::env::temp_dir().join(format!("peregrine-plot-{}", std::process::id()));
        draw(&dir, &curves).unwrap();
        let read = |name: &str| std::fs::read_to_string(dir.join(name)).unwrap();
        let (live, flows) = (read("switch-over-live-stack.svg"), read("switch-over-flows.svg"));
        std::fs::remove_dir_all(&dir).unwrap();
        assert!(
            live.contains("alias, conflict") && live.contains("live stack, KiB") && !live.contains("empty")
        );
        assert!((0..COLOURS.len()).all(|i| flows.contains(&format!("way {i}"))));
    }

    /// The values of attribute `name` of each `element` of a figure.
    fn values(figure: &str, element: &str, name: &str) -> Vec<f64> {
        let of_one = |rest: &str| {
            let (tag, _) = rest.split_once('>')?;
            tag.split_once(&format!(" {name}=\""))?.1.split_once('"')?.0.parse().ok()
        };
        figure.split(&format!("<{element}")).skip(1).filter_map(of_one).collect()
    }

    #[test]
    fn axes_are_logarithmic_and_no_text_lies_on_another() {
        // Each point eight times as far, and a hundred times as high, as the one before.
        let points =
            |low: f64| (0..4).map(|i| (f64::powi(8.0, i) * 1024.0, f64::powi(100.0, i) * low)).collect();
        let over_live = vec![("alias".to_owned(), points(5.0)), ("copy".to_owned(), points(50.0))];
        let curves = Curves { over_live, over_threads: Vec::new() };
        let dir = std::env::temp_dir().join(format!("peregrine-axes-{}", std::process::id()));
        draw(&dir, &curves).unwrap();
        let live = std::fs::read_to_string(dir.join("switch-over-live-stack.svg")).unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
        for (name, grows) in [("cx", true), ("cy", false)] {
            let at = values(&live, "circle", name);
            assert_eq!(at.len(), 8, "{at:?}");
            let steps: Vec<f64> = at.chunks(4).flat_map(|c| c.windows(2).map(|w| w[1] - w[0])).collect();
            assert!(
                steps.iter().all(|s| (s - steps[0]).abs() <= 1.0 && (*s > 40.0) == grows),
                "{name}: {at:?}"
            );
        }
        let places: Vec<(f64, f64)> =
            values(&live, "text", "x").into_iter().zip(values(&live, "text", "y")).collect();
        assert!(places.len() > 8, "title, axes, and two curves: {places:?}");
        for (i, a) in places.iter().enumerate() {
            let over = places[..i].iter().find(|b| (a.0 - b.0).abs() < 50.0 && (a.1 - b.1).abs() < 14.0);
            assert!(over.is_none(), "{a:?} lies on {over:?}");
        }
    }
}
