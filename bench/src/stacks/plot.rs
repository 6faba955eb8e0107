//! The two figures: switch time over live stack, and over the number of flows. SVG, both axes logarithmic.

use super::switch::{Curve, Curves};
use plotters::prelude::*;
use std::error::Error;
use std::path::Path;

/// Draws both into `dir`.
pub fn draw(dir: &Path, curves: &Curves) -> Result<(), Box<dyn Error>> {
    std::fs::create_dir_all(dir)?;
    figure(
        &dir.join("switch-over-live-stack.svg"),
        "Switch time, 2 threads",
        "live stack, bytes",
        &curves.over_live,
    )?;
    figure(
        &dir.join("switch-over-flows.svg"),
        "Switch time, 8 KiB of live stack",
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
    let area = SVGBackend::new(path, (900, 560)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 22))
        .margin(14)
        .x_label_area_size(44)
        .y_label_area_size(70)
        .build_cartesian_2d(x_range.log_scale(), y_range.log_scale())?;
    chart.configure_mesh().x_desc(x).y_desc("ns a switch").draw()?;
    for (i, (name, points)) in curves.iter().enumerate().filter(|(_, c)| !c.1.is_empty()) {
        let colour = Palette99::pick(i).to_rgba();
        chart
            .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)).point_size(3))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK)
        .draw()?;
    area.present()?;
    Ok(())
}
